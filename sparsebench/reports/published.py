"""Numbers that papers printed, beside ours. They are never mixed with ours and decide nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.paths import data_folder
from sparsebench.reports.data import DENSE, SweepData

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = "paper arxiv method model dataset setting sparsity pattern metric value unit source quality".split()
QUALITIES = ("first-hand", "second-hand", "unverified")
_NEAR = 0.005  # of a sparsity


def load(papers: Collection[str], folder: Path | None = None) -> DataFrame:
    """The published rows of these papers (files of that name), columns COLUMNS; empty when there are none."""
    import pandas

    folder = folder or data_folder("reports") / "published"
    files = [folder / f"{paper}.csv" for paper in papers]
    texts = {name: str for name in COLUMNS if name not in ("sparsity", "value")}
    frames = [pandas.read_csv(file, dtype=texts, keep_default_na=True) for file in files if file.is_file()]
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=COLUMNS)


def papers_of(sweep: SweepData) -> list[str]:
    """The slugs that a sweep's numbers may stand in: its paper, its claims' papers, its methods' own."""
    parts = [part for label in sweep.runs["method"].unique() for part in str(label).split("+")]
    own = [sweep.spec.paper] if sweep.spec and sweep.spec.paper else []
    claimed = [claim.paper for claim in sweep.spec.claims] if sweep.spec else []
    return list(dict.fromkeys([*own, *claimed, *(part for part in parts if part != DENSE)]))


def beside(sweep: SweepData, levels: DataFrame) -> DataFrame:
    """Every published number of a method and level that this sweep has, with ours at the same method, level and
    pattern on each of our models: columns paper, method, sparsity, pattern, metric, published, unit, their_model,
    their_data, setting, place, quality, ours, ours_low, ours_high, our_model, our_task, difference, note.

    ``difference`` is filled only where model and metric are the same; else the note says what differs. ``levels``:
    the levels of the sweep, with a column ``base`` (the method's name without options) and ``pattern``.
    """
    from pandas import DataFrame

    found = load(papers_of(sweep))
    rows: list[dict[str, Any]] = []
    for theirs in found.to_dict("records"):
        for ours in _same_point(levels, theirs).to_dict("records"):
            rows.append(_row(theirs, ours))
    frame = DataFrame(rows, columns=list(_row({}, {})))
    return frame.drop_duplicates(ignore_index=True)


def _same_point(levels: DataFrame, theirs: dict[str, Any]) -> DataFrame:
    own = levels[(levels["base"] == theirs["method"]) & (levels["metric"] == theirs["metric"])]
    if theirs["metric"] == "score":  # every benchmark calls its own so
        benchmark = str(theirs["dataset"]).lower().partition(" ")[0]
        own = own[own["task"].astype(str).str.lower().str.contains(benchmark, regex=False)]
    if theirs["method"] == DENSE:
        return own
    own = own[(own["requested"] - float(theirs["sparsity"])).abs() <= _NEAR]
    kind = str(theirs["pattern"]).split()[0] if isinstance(theirs["pattern"], str) else "unstructured"
    return own[own["pattern"] == kind]


def _row(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    same = bool(theirs) and str(theirs["model"]).lower() == str(ours["model"]).lower()
    return {
        "paper": theirs.get("paper"),
        "method": theirs.get("method"),
        "sparsity": theirs.get("sparsity"),
        "pattern": theirs.get("pattern"),
        "metric": theirs.get("metric"),
        "published": theirs.get("value"),
        "unit": theirs.get("unit"),
        "their_model": theirs.get("model"),
        "their_data": theirs.get("dataset"),
        "setting": theirs.get("setting"),
        "place": theirs.get("source"),
        "quality": theirs.get("quality"),
        "ours": ours.get("score"),
        "ours_low": ours.get("ci_low"),
        "ours_high": ours.get("ci_high"),
        "our_model": ours.get("model"),
        "our_task": ours.get("task"),
        "difference": ours["score"] - theirs["value"] if same else None,
        "note": "same model name; check data and setting" if same else "other model and data: compare the pattern only",
    }
