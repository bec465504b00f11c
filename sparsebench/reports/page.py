"""The executed notebook as one HTML file that needs no network and no explanation.

What a cell displayed is shown; its code stands behind "code". Tables and figures are complete without scripts; the
vendored libraries (``vendor/README.md``) make tables sort and filter, and points answer.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.reports.show import KEY

if TYPE_CHECKING:
    from nbformat import NotebookNode

_HERE = Path(__file__).parent
STYLES = ("vendor/datatables/dataTables.dataTables.min.css", "assets/page.css")
SCRIPTS = (
    "vendor/datatables/dataTables.min.js",
    "vendor/popper/popper.min.js",
    "vendor/tippy/tippy-bundle.umd.min.js",
    "assets/page.js",
)
_HEADING = re.compile(r"<h2>(.*?)</h2>")
# Nothing on the page may ask a network for anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(book: NotebookNode, title: str) -> str:
    """The whole page. ``book``: executed."""
    body, contents = [], []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            text = _markdown(cell.source)
            for heading in _HEADING.findall(text):
                contents.append((cell.id, re.sub("<.*?>", "", heading)))
            body.append(f'<div class="text" id="{cell.id}">{text}</div>')
        else:
            body.append(_cell(cell))
    head, rest = (body[1], body[2:]) if len(body) > 1 else ("", body)
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in contents)
    return _document(title, f"{head}<nav><ol>{links}</ol></nav><main>{''.join(rest)}</main>{body[0] if body else ''}")


def _cell(cell: NotebookNode) -> str:
    """The outputs, neighbouring figures in one row, then the code."""
    parts: list[str] = []
    figures: list[str] = []
    for output in cell.get("outputs", ()):
        facts = output.get("metadata", {}).get(KEY, {})
        if facts.get("kind") == "figure":
            figures.append(_figure(output, facts))
            continue
        if figures:
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
            figures = []
        parts.append(_output(output, facts))
    if figures:
        parts.append(f'<div class="figures">{"".join(figures)}</div>')
    code = f'<details class="code"><summary>code</summary><pre>{html.escape(cell.source)}</pre></details>'
    return f'<section class="cell" id="cell-{cell.id}">{"".join(parts)}{code}</section>'


def _figure(output: NotebookNode, facts: dict[str, Any]) -> str:
    name = html.escape(facts["name"])
    files = " ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in ("pdf", "svg", "png"))
    return (
        f'<figure id="figure-{name}">{output["data"]["image/svg+xml"]}'
        f'<figcaption>{html.escape(facts["caption"])} <span class="files">{files}</span></figcaption></figure>'
    )


def _output(output: NotebookNode, facts: dict[str, Any]) -> str:
    if output.output_type == "stream":
        return f"<pre>{html.escape(output.text)}</pre>"
    data = output.get("data", {})
    if facts.get("kind") == "table":
        name = html.escape(facts["name"])
        files = " ".join(f'<a href="tables/{name}.{kind}">{kind.upper()}</a>' for kind in ("csv", "md", "tex"))
        return f'<div class="table">{data["text/html"]}<p class="files">{files}</p></div>'
    if "text/html" in data:
        return str(data["text/html"])
    if "text/markdown" in data:
        return f'<div class="says">{_markdown(data["text/markdown"])}</div>'
    return f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"


def _markdown(text: str) -> str:
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": False}).render(text))


def _document(title: str, body: str) -> str:
    styles = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in STYLES)
    scripts = "\n".join(f"<script>{(_HERE / name).read_text(encoding='utf-8')}</script>" for name in SCRIPTS)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{styles}</style></head>\n<body>{body}\n{scripts}</body></html>\n"
    )


def simple(title: str, body: str) -> str:
    """A page with the same look around any HTML."""
    return _document(title, f"<main>{body}</main>")


def as_json(book: NotebookNode) -> str:
    """The notebook as it is written: sorted keys, so that two of them can be compared line by line."""
    return json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
