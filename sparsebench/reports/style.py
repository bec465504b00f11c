"""How figures look: one colour, marker and dash a method through the whole report, readable in print and in grey."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours, in this order; dense is black and the naive baselines grey. Yellow is only for fills.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK, GREY, YELLOW = "#000000", "#808080", "#F0E442"
MARKERS = "osD^vPX*<>"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 2, 1, 2, 1, 2)))
COLUMN, FULL = 3.35, 6.9  # inches
RATIO = 0.62  # height by width
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
DPI = 200


@dataclass(frozen=True)
class Look:
    """What a method is drawn with."""

    colour: str
    marker: str
    dash: Any


def looks(methods: Sequence[str], naive: Sequence[str]) -> dict[str, Look]:
    """A look for every label; beyond six methods colours come again with other dashes and markers."""
    found = {"dense": Look(BLACK, "s", (0, (3, 2)))}
    for at, name in enumerate(one for one in methods if one in naive):
        found[name] = Look(GREY, "x+1234"[at % 6], DASHES[(at + 1) % len(DASHES)])
    for at, name in enumerate(one for one in methods if one not in found):
        dash = DASHES[(at + at // len(COLOURS)) % len(DASHES)]
        found[name] = Look(COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)], dash)
    return found


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """The settings for everything drawn and saved inside. ``name`` makes ids in SVG files unique and repeatable."""
    import matplotlib

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.6,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "pdf.fonttype": 42,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(settings):
        yield
