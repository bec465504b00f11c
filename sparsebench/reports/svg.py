"""Matplotlib's SVG, made ready to stand in a page: unique ids, a text for screen readers, points that answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from sparsebench.reports.figures import Mark

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_WIDE = 300  # points; wider than one column
_ID = re.compile(r"url\(#([^)]+)\)")


def annotated(text: str, name: str, marks: Mapping[str, tuple[str, Sequence[Mark]]], alt: str) -> str:
    """The SVG element alone (no XML head), with every id prefixed by ``name``.

    ``marks``: id of a group of markers -> (its series, a mark a marker, in drawing order). Each marker becomes a link
    to its run with a native tooltip (``title``) and ``data-tip`` for a better one; its group carries ``data-series``.
    ValueError when the drawing has another number of markers than there are marks.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(text)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    found = {element.get("id"): element for element in root.iter(f"{{{_SVG}}}g")}
    for gid, (series, own) in marks.items():
        if gid in found:
            _mark(found[gid], series, own)
        elif own:
            raise ValueError(f"figure {name}: nothing was drawn for {gid} ({series})")
    for element in root.iter():
        _renamed(element, name)
    root.set("role", "img")
    root.set("aria-label", alt)
    if float(str(root.get("width")).removesuffix("pt")) > _WIDE:
        root.set("data-wide", "yes")
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode")


def _mark(group: ElementTree.Element, series: str, marks: Sequence[Mark]) -> None:
    group.set("data-series", series)
    places = [(parent, child) for parent in group.iter() for child in parent if child.tag == f"{{{_SVG}}}use"]
    if len(places) != len(marks):
        raise ValueError(f"{series}: {len(places)} markers were drawn for {len(marks)} points")
    for (parent, use), mark in zip(places, marks, strict=True):
        at = list(parent).index(use)
        parent.remove(use)
        holder = ElementTree.Element(
            f"{{{_SVG}}}{'a' if mark.run_id else 'g'}", {"class": "point", "data-tip": mark.tip}
        )
        if mark.run_id:
            holder.set("href", f"#run-{mark.run_id}")
        else:
            holder.set("tabindex", "0")
        title = ElementTree.SubElement(holder, f"{{{_SVG}}}title")
        title.text = mark.tip
        # A larger target than the marker itself, for fingers.
        x, y = use.get("x", "0"), use.get("y", "0")
        ElementTree.SubElement(holder, f"{{{_SVG}}}circle", {"cx": x, "cy": y, "r": "6", "class": "target"})
        holder.append(use)
        parent.insert(at, holder)


def _renamed(element: ElementTree.Element, name: str) -> None:
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key in ("href", f"{{{_XLINK}}}href") and value.startswith("#") and not value.startswith("#run-"):
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, _ID.sub(lambda match: f"url(#{name}-{match[1]})", value))
