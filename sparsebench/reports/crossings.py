"""Costs at which model sizes change places, and the speed-ups of the levels that were timed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis import frontiers
from sparsebench.analysis.statistics import Array
from sparsebench.reports.data import DENSE
from sparsebench.reports.levels import Paired, row_of

if TYPE_CHECKING:
    from pandas import DataFrame

PHASES = {"prefill": "flops_prefill", "decode": "bytes_decode"}
"""Phase -> the cost that bounds it: what a speed-up is measured beside."""
_RESAMPLES = 200


def crossings(points: DataFrame, cost: str, groups: Mapping[tuple[str, str], Paired]) -> DataFrame:
    """Of one task: model, larger, cost, above, low, high, share; one row a crossover of neighbouring sizes, or one
    without a cost where they do not change places. ``above``: which is the better above that cost; ``low``, ``high``:
    its 95% interval, and ``share`` of the resamples that have one, of the first crossover in that direction.

    At every cost the best of a size for no more is taken over its methods' own curves, each with the dense model at its
    end, and stays where they end; nothing is interpolated between methods. ``points``: the levels of one task with
    ``cost``, quality, se and run_ids.
    """
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for small, large in itertools.pairwise(sizes(points, cost)):
        pair = points[points["model"].isin((small, large))]
        draws = _draws(pair, groups)
        lines = {name: _lines(pair, name, cost) for name in (small, large)}
        values = pair["quality"].to_numpy(float)
        found = frontiers.crossovers(_at(lines[small], values), _at(lines[large], values))
        pairs = [(_at(lines[small], one), _at(lines[large], one)) for one in draws]
        first = {larger: frontiers.crossover_interval(pairs, larger) for larger in (True, False)}
        for place, larger in found or [frontiers.Crossover(np.nan, True)]:
            row = {"model": small, "larger": large, "cost": place, "above": large if larger else small}
            # the interval is that of the first crossover in a direction, and stands in its row only
            rows.append({**row, **dict(zip(("low", "high", "share"), first.pop(larger, [np.nan] * 3), strict=True))})
    frame = DataFrame(rows, columns=["model", "larger", "cost", "above", "low", "high", "share"])
    return frame.assign(above=frame["above"].where(frame["cost"].notna(), ""))


def sizes(points: DataFrame, cost: str) -> list[str]:
    """The models that have a dense point with that cost, the smallest first: by operations, which are counted, where
    they are known (milliseconds may order them by chance)."""
    dense = points[(points["method"] == DENSE) & points[cost].notna()]
    by = "flops_prefill" if "flops_prefill" in dense and dense["flops_prefill"].notna().all() else cost
    return [str(one) for one in dense.sort_values(by)["model"].drop_duplicates()]


def best(points: DataFrame, model: str, cost: str) -> tuple[Array, Array]:
    """Costs from the cheapest point of a size to the dearest of all sizes, and the best quality of it for no more than
    each, both (steps,)."""
    lines = _at(_lines(points, model, cost), points["quality"].to_numpy(float))
    reached = np.concatenate([np.asarray(one[0], float) for one in lines])
    at = np.unique(np.concatenate([reached, np.geomspace(reached.min(), points[cost].max(), 100)]))
    return at, frontiers.best_at(lines, at)


def _lines(points: DataFrame, model: str, cost: str) -> list[tuple[Array, Any]]:
    """Each method's own curve of that size: its costs and the rows of ``points`` that it goes through."""
    rows = points.reset_index(drop=True)
    own = rows[(rows["model"] == model) & rows[cost].notna() & (rows[cost] > 0)]
    dense = own.index[own["method"] == DENSE]
    found = []
    for _, curve in own[own["method"] != DENSE].groupby("method", sort=False):
        at = [*dense, *curve.index]
        found.append((own.loc[at, cost].to_numpy(float), np.array(at)))
    return found or [(own.loc[dense, cost].to_numpy(float), np.array(dense))]


def _at(lines: Sequence[tuple[Array, Any]], values: Array) -> list[tuple[Array, Array]]:
    return [(costs, values[rows]) for costs, rows in lines]


def _draws(points: DataFrame, groups: Mapping[tuple[str, str], Paired]) -> Array:
    """(resamples, points) qualities, on the same samples where the models share them."""
    rows = [row_of(groups, row) for row in points[["model", "task", "run_ids"]].to_dict("records")]
    known = [row for row in rows if row is not None]
    if len(known) == len(rows) and len({len(row) for row in known}) == 1:
        return frontiers.resampled(np.stack(known), _RESAMPLES)
    errors = np.nan_to_num(points["se"].to_numpy(float))
    return frontiers.normal_draws(points["quality"].to_numpy(float), errors, _RESAMPLES)


def speed(used: DataFrame) -> DataFrame:
    """The timed levels: model, method, achieved, phase, ms, dense_ms, speedup, low, high (over tasks and runs),
    theoretical; empty when no run was timed with a kernel."""
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for phase, bound in PHASES.items():
        column = f"speedup_{phase}"
        if column not in used:
            continue
        timed = used[used[column].notna() & (used["method_label"] != DENSE)]
        for (model, method, _), own in timed.groupby(
            ["model_label", "method_label", "level"], dropna=False, sort=False
        ):
            ratios = own[column].astype(float)
            theory = own[f"{bound}_dense"] / own[bound] if bound in own else own[column] * np.nan
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "achieved": float(own["achieved"].mean()),
                    "phase": phase,
                    "ms": float(own[f"ms_{phase}"].mean()),
                    "dense_ms": float(own[f"ms_{phase}_dense"].mean()),
                    "speedup": frontiers.geometric_mean(ratios),
                    "low": float(ratios.min()),
                    "high": float(ratios.max()),
                    "theoretical": float(theory.mean()),
                    "runs": len(own),
                }
            )
    columns = "model method achieved phase ms dense_ms speedup low high theoretical runs".split()
    return DataFrame(rows, columns=columns)


def break_even(curve: DataFrame) -> float:
    """The achieved sparsity from which one method of one model is faster than dense at every level, between its
    levels; not a number where the highest level is slower, 0 where none is."""
    own = curve.sort_values("achieved")
    x, y = own["achieved"].to_numpy(float), own["speedup"].to_numpy(float) - 1
    slower = np.flatnonzero(y < 0)
    at = int(slower[-1]) + 1 if len(slower) else 0
    if at == len(x):
        return float("nan")
    return 0.0 if at == 0 else float(x[at - 1] - y[at - 1] * (x[at] - x[at - 1]) / (y[at] - y[at - 1]))
