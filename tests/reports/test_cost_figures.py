"""Sizes at one cost, measured speed-ups, laws side by side: the numbers and what is drawn of them."""

from __future__ import annotations

import io
import itertools
from html import escape

import matplotlib
import numpy as np
import pandas
import pytest

from sparsebench.reports import cost_figures, crossings, style
from sparsebench.reports.figures import Drawn
from sparsebench.reports.svg import annotated

matplotlib.use("svg")


def two_sizes() -> pandas.DataFrame:
    """A small model (costs 1 to 10) and a large one (3 to 30) whose best curves cross at a cost of 6.

    On the logarithm of the cost the small one gains .1 and the large one .3 for each factor of ten."""
    rows = []
    for model, dense, gain, costs in (("small", 10.0, 0.1, (1, 3, 6)), ("large", 30.0, 0.3, (3, 6, 12))):
        for cost in (*costs, dense):
            quality = 0.5 + gain * np.log10(cost / 6)
            method = "dense" if cost == dense else "pruner"
            rows.append({"model": model, "method": method, "cost": float(cost), "quality": quality, "score": quality})
    frame = pandas.DataFrame(rows)
    ids = [[f"r{at}"] for at in range(len(frame))]
    return frame.assign(task="t", metric="accuracy", se=1e-4, run_ids=ids, achieved=0.5, requested=0.5)


def test_sizes_change_places_where_their_best_curves_cross() -> None:
    points = two_sizes()
    assert crossings.sizes(points, "cost") == ["small", "large"]
    (row,) = crossings.crossings(points, "cost", {}).to_dict("records")
    assert (row["model"], row["larger"]) == ("small", "large")
    assert row["cost"] == pytest.approx(6, rel=1e-3)
    assert row["low"] < 6 < row["high"]
    assert row["share"] == 1
    worse = points.assign(quality=np.where(points["model"] == "large", 0.0, points["quality"]))
    (none,) = crossings.crossings(worse, "cost", {}).to_dict("records")
    assert np.isnan(none["cost"])
    assert none["share"] == 0


def test_best_of_a_size_is_over_its_methods_own_curves() -> None:
    points = two_sizes()
    other = points[points["model"] == "small"].assign(method="other").iloc[:1]
    other = other.assign(quality=0.9, score=0.9)
    both = pandas.concat([points, other], ignore_index=True)
    at, quality = crossings.best(both, "small", "cost")
    assert at[0] == 1
    assert quality[0] == pytest.approx(0.9), "the better method counts"
    assert quality[-1] == pytest.approx(0.9), "and is still to be had for more"


def test_sizes_change_places_beyond_the_dense_cost_of_the_smaller() -> None:
    sizes = (("small", (60, 80, 100), (0.2, 0.4, 0.5)), ("large", (90, 120, 200), (0.3, 0.7, 0.9)))
    points = pandas.DataFrame(
        [
            {"model": model, "method": "dense" if cost == costs[-1] else "pruner", "cost": float(cost), "quality": one,
             "se": 1e-4, "task": "t", "run_ids": [f"{model}{cost}"]}
            for model, costs, qualities in sizes for cost, one in zip(costs, qualities, strict=True)
        ]
    )  # fmt: skip
    (row,) = crossings.crossings(points, "cost", {}).to_dict("records")
    assert row["cost"] == pytest.approx(10800**0.5) and row["above"] == "large"
    assert row["low"] < row["cost"] < row["high"] and row["share"] == 1
    at, quality = crossings.best(points, "small", "cost")
    assert at[0] == 60 and at[-1] == pytest.approx(200), "its line is drawn where it is crossed"
    assert np.isfinite(quality).all() and (quality[at >= 100] == 0.5).all()


def timed_runs() -> pandas.DataFrame:
    """One method at three levels on two tasks; the speed-ups of the second task are twice those of the first."""
    rows = []
    for level, achieved, speed in ((0, 0.25, 0.8), (1, 0.5, 1.2), (2, 0.75, 2.0)):
        for factor in (1.0, 2.0):
            rows.append(
                {
                    "model_label": "m", "method_label": "pruner", "level": level, "achieved": achieved,
                    "speedup_decode": speed * factor, "ms_decode": 10 / speed, "ms_decode_dense": 10.0,
                    "bytes_decode": 100 * (1 - achieved), "bytes_decode_dense": 100.0,
                }
            )  # fmt: skip
    return pandas.DataFrame(rows)


def test_measured_speed_beside_its_bound() -> None:
    timed = crossings.speed(timed_runs())
    assert timed["phase"].unique().tolist() == ["decode"], "no prefill was timed"
    assert timed["speedup"].tolist() == pytest.approx([0.8 * 2**0.5, 1.2 * 2**0.5, 2 * 2**0.5])
    assert timed["low"].tolist() == [0.8, 1.2, 2.0]
    assert timed["theoretical"].tolist() == pytest.approx([4 / 3, 2, 4])
    assert crossings.speed(timed_runs().drop(columns="speedup_decode")).empty


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ((0.8, 1.2, 2.0), 0.375),
        ((1.1, 1.2, 2.0), 0.0),
        ((1.1, 0.9, 1.1), 0.625),  # once it was faster by chance
        ((0.5, 0.6, 0.7), None),
        ((1.5, 1.6, 0.9), None),
    ],
)
def test_break_even(speeds: tuple[float, ...], expected: float | None) -> None:
    found = crossings.break_even(pandas.DataFrame({"achieved": [0.25, 0.5, 0.75], "speedup": speeds}))
    assert np.isnan(found) if expected is None else found == pytest.approx(expected)


def tips(drawn: Drawn) -> list[str]:
    """What the marks of a figure say, in order; each must be in its SVG."""
    file = io.StringIO()
    drawn.figure.savefig(file, format="svg")
    svg = annotated(file.getvalue(), "figure", drawn.marks, "what is shown")
    said = [mark.tip for _, marks in drawn.marks.values() for mark in marks]
    assert all(escape(tip) in svg for tip in said)
    return said


def test_figures_of_costs_name_every_point() -> None:
    points = two_sizes()
    said = tips(cost_figures.iso_cost(points, crossings.crossings(points, "cost", {}), "cost", "FLOPs"))
    assert len(said) == len(points)
    assert "pruner at 0.500 of large: 0.5903 at 12" in said
    broken = pandas.concat([points, points.iloc[[0]].assign(quality=-40.0, run_ids=[["b"]])], ignore_index=True)
    assert len(tips(cost_figures.iso_cost(broken, crossings.crossings(points, "cost", {}), "cost", "FLOPs"))) == len(
        points
    )
    said = tips(cost_figures.latency(crossings.speed(timed_runs()), style.looks(["pruner"], [])))
    assert said[-1] == "pruner at 0.750: 5 ms, dense 10 ms, 2.83x (bound 4.00x)"


@pytest.mark.parametrize(("largest", "measure"), [(0.2, "mean relative error"), (0.012, "mean absolute error")])
def test_laws_side_by_side_say_what_their_error_is(largest: float, measure: str) -> None:
    """The axis names the measure, and all of its words and numbers are inside the figure and apart, over a wide range
    and over a narrow one."""
    found = (("frontier prefill binomial", "N", 0.01), ("frontier prefill ols", "N", largest), ("power", "D", 0.011))
    errors = [{"law": law, "left_out": left, "error": error} for law, left, error in found]
    with style.drawing("laws"):
        drawn = cost_figures.law_comparison(errors, measure)
        assert f"power without the highest D: {measure} 0.011" in tips(drawn)
        axes = drawn.figure.axes[0]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [law for law, _, _ in found]
        drawn.figure.canvas.draw()
        words = [one for one in drawn.figure.texts if one.get_text() == f"{measure} (lower is better)"]
        boxes = [one.get_window_extent() for one in (*words, *drawn.figure.legends)]
        low, high = axes.get_xlim()
        shown = [one for one in axes.get_xticklabels() if low <= one.get_position()[0] <= high and one.get_text()]
        boxes += [one.get_window_extent() for one in shown]
    assert len(words) == 1 and len(shown) >= 2
    width, height = drawn.figure.bbox.size
    assert all(one.x0 >= 0 and one.x1 <= width and one.y0 >= 0 and one.y1 <= height for one in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_every_change_of_places_says_which_size_is_better_above() -> None:
    """Three sizes. The middle one takes over from the small at 6; the large one is the better at once, until the middle
    one passes it at a cost of 13."""
    points = two_sizes().replace({"model": {"large": "middle"}})
    third = [(8.0, 0.60, "pruner"), (19.0, 0.60, "pruner"), (100.0, 0.62, "dense")]
    rows = [
        {"model": "large", "method": method, "cost": cost, "quality": quality, "score": quality, "se": 1e-4,
         "task": "t", "metric": "accuracy", "run_ids": [f"l{cost}"], "achieved": 0.5, "requested": 0.5}
        for cost, quality, method in third
    ]  # fmt: skip
    found = crossings.crossings(pandas.concat([points, pandas.DataFrame(rows)], ignore_index=True), "cost", {})
    assert found[["model", "larger", "above"]].to_numpy().tolist() == [
        ["small", "middle", "middle"], ["middle", "large", "middle"]
    ]  # fmt: skip
    assert found["cost"].tolist() == pytest.approx([6, 6 * 10 ** (1 / 3)], rel=1e-3)
    assert (found["low"] < found["cost"]).all() and (found["cost"] < found["high"]).all()
    assert found["share"].tolist() == [1, 1]
