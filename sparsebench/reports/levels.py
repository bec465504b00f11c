"""What is computed from per-sample outcomes for a report: errors of levels, paired differences, safe sparsity, knees.

A *level* is one point of a curve: one model, task, method and request, over its seeds (``data.LEVEL``). The tests
and their formulas are those of ``sparsebench.analysis``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis import curves, frontiers
from sparsebench.analysis.outcomes import Outcomes, Untested, are_shares, column_of, layout, outcomes
from sparsebench.analysis.statistics import ALPHA, Array, Effect, Estimate, Population, jackknife, mean
from sparsebench.reports.data import DENSE, LEVEL, SweepData

if TYPE_CHECKING:
    from pandas import DataFrame

_LARGEST = 4_000_000  # points x resamples
_RESAMPLES = 2000
_TARGETS = 12  # sparsities of a table of methods
_SAME = 0.005  # achieved sparsities that count as the same (fairness.Policy)
_CLEAR = 6.0  # standard errors from which a point is clearly dominated


@dataclass(frozen=True)
class Paired:
    """The outcomes of one model on one task, all on the same samples. ``values``: run id -> (samples,) quality;
    ``population``: None when there are no usable samples, and ``why``; ``bounds``: between which all qualities of the
    task are, None when there are none."""

    values: Mapping[str, Array] = field(default_factory=dict)
    population: Population | None = None
    bounds: tuple[float, float] | None = None
    why: str = ""

    def matrix(self, run_ids: Sequence[str]) -> Array | None:
        """(seeds, samples), None when a run has no outcomes."""
        if self.population is None or any(run_id not in self.values for run_id in run_ids):
            return None
        return np.stack([self.values[run_id] for run_id in run_ids])

    def within(self, found: Estimate) -> tuple[float, float]:
        """The 95% interval of a mean, within the bounds of the task. Not numbers where it is not known: without any
        spread among few samples."""
        low, high = found.interval()
        if not math.isfinite(high - low):
            return math.nan, math.nan
        return (max(low, self.bounds[0]), min(high, self.bounds[1])) if self.bounds else (low, high)

    def estimate(self, values: Array) -> Estimate:
        """The mean of (seeds, samples) with its two-way jackknife error."""
        population = self.population or Population.plain(values.shape[1])
        effect: Effect = lambda weights: mean(values, population, weights.seeds, weights.items[0])  # noqa: E731
        return jackknife(effect, len(values), [population], bounded=self.bounds is not None)


def paired(sweep: SweepData) -> dict[tuple[str, str], Paired]:
    """(model label, task label) -> the outcomes of its runs that count."""
    counted = sweep.runs[sweep.runs["state"] == "ok"]
    return {
        (str(model), str(task)): _paired(sweep, group.to_dict("records"))
        for (model, task), group in counted.groupby(["model_label", "task_label"], sort=False)
    }


def _paired(sweep: SweepData, rows: Sequence[Mapping[str, Any]]) -> Paired:
    """The samples of all rows in the order of the first row's. Runs on other samples are an error of the store, and
    leave the group without samples."""
    try:
        found: dict[str, Outcomes] = {}
        scores: dict[str, float | None] = {}
        signs: dict[str, int] = {}
        shares = True
        for row in rows:
            column, scores[row["run_id"]] = column_of("score", row)
            found[row["run_id"]] = outcomes(sweep.samples[row["run_id"]], column)
            signs[row["run_id"]] = -1 if row["better"] == "lower" else 1
            shares = shares and are_shares(column, found[row["run_id"]].values)
        first = next(iter(found.values()))
        if any(set(one.ids) != set(first.ids) for one in found.values()):
            raise Untested("the runs were not evaluated on the same samples")
        aligned = {run_id: _aligned(one, first) for run_id, one in found.items()}
        population = layout(first, [(run_id, aligned[run_id], scores[run_id]) for run_id in aligned])
    except Untested as reason:
        return Paired(why=str(reason))
    ends = (0.0, 1.0) if 1 in signs.values() else (-1.0, 0.0)
    qualities = {run_id: signs[run_id] * values for run_id, values in aligned.items()}
    return Paired(qualities, population, ends if shares else None)


def _aligned(own: Outcomes, first: Outcomes) -> Array:
    if own.ids == first.ids:
        return own.values
    places = {one: at for at, one in enumerate(own.ids)}
    return own.values[[places[one] for one in first.ids]]


def errors(used: DataFrame, groups: Mapping[tuple[str, str], Paired]) -> DataFrame:
    """The error of each level's mean quality, a row a level in the order of ``used.groupby(LEVEL, sort=False)``:
    se, low and high (of the 95% interval) and interval (how it was made; ``unknown``: there is none).

    ``used``: the runs of every level. By the two-way jackknife over seeds and samples where there are per-sample
    outcomes. Otherwise from the records' own standard errors: their mean square, as all seeds see the same samples,
    plus the variance between seeds over their number; the interval is then +-1.96 se. An error of 0 tells nothing.
    """
    from pandas import DataFrame

    rows = []
    needed = used[[*LEVEL, "run_id", "quality", "quality_se"]]  # cutting a wide table into levels takes long
    for key, level in needed.groupby(LEVEL, dropna=False, sort=False):
        own = groups.get((key[0], key[1]), Paired())
        values = own.matrix(level["run_id"].tolist())
        if values is not None:
            found = own.estimate(values)
            low, high = own.within(found)
            rows.append((found.se, low, high, _named_interval(found, high)))
            continue
        seeds, quality, error = len(level), level["quality"].to_numpy(float), level["quality_se"].to_numpy(float)
        between = float(quality.var(ddof=1)) / seeds if seeds > 1 else 0.0
        se = math.sqrt(float(np.mean(error**2)) + between)
        half, middle = 1.96 * se if se else math.nan, float(quality.mean())
        rows.append((se, middle - half, middle + half, "normal" if math.isfinite(half) else "unknown"))
    return DataFrame(rows, columns=["se", "low", "high", "interval"])


def _named_interval(found: Estimate, high: float) -> str:
    if not math.isfinite(high):
        return "unknown"
    return "jackknife t" if found.se > 0 else "rule of three" if found.bounded else "exact"


def matched(points: DataFrame, groups: Mapping[tuple[str, str], Paired]) -> DataFrame:
    """Every method at the same achieved sparsities: columns model, task, at, method, quality, se, interpolated and
    outcomes ((seeds, samples), None where there are none).

    ``points``: the levels (model, task, method, requested, achieved, quality, se, hollow, run_ids). The sparsities
    are the requested ones. A method that reached another one is interpolated along its own curve, which begins at
    dense; it is never compared at another sparsity, and never beyond the ends of its curve.
    """
    from pandas import DataFrame

    rows = []
    for (model, task), here in points[~points["hollow"]].groupby(["model", "task"], sort=False):
        own = groups.get((str(model), str(task)), Paired())
        dense = here[here["method"] == DENSE].head(1)
        targets = _targets(here)
        for method, curve in here[here["method"] != DENSE].groupby("method", sort=False):
            anchors = [*dense.to_dict("records"), *curve.sort_values("achieved").to_dict("records")]
            for target in targets:
                found = _at(anchors, target, own)
                if found is not None:
                    rows.append({"model": model, "task": task, "at": target, "method": method, **found})
    return DataFrame(rows, columns="model task at method quality se interpolated outcomes".split())


def _targets(here: DataFrame) -> list[float]:
    """The requested sparsities, or tenths where levels are something else (a budget, a threshold)."""
    asked = sorted({float(one) for one in here["requested"].dropna() if 0 < one < 1})
    if not asked:
        return [at / 10 for at in range(1, 10)]
    step = -(-len(asked) // _TARGETS)
    return asked[::step]


def _at(anchors: Sequence[Mapping[str, Any]], target: float, own: Paired) -> dict[str, Any] | None:
    """The method at that sparsity; None beyond its curve's ends."""
    sparse = [one for one in anchors if one["method"] != DENSE]
    nearest = min(sparse, key=lambda one: abs(one["achieved"] - target), default=None)
    if nearest is not None and abs(nearest["achieved"] - target) <= _SAME:
        values = own.matrix(nearest["run_ids"])
        return {"quality": nearest["quality"], "se": nearest["se"], "interpolated": False, "outcomes": values}
    for left, right in itertools.pairwise(anchors):
        if left["achieved"] < target < right["achieved"]:
            share = (target - left["achieved"]) / (right["achieved"] - left["achieved"])
            sides = own.matrix(left["run_ids"]), own.matrix(right["run_ids"])
            values = None
            if sides[0] is not None and sides[1] is not None:
                values = (1 - share) * _seeds(sides[0], sides[1]) + share * _seeds(sides[1], sides[0])
            se = math.hypot((1 - share) * left["se"], share * right["se"])
            return {
                "quality": (1 - share) * left["quality"] + share * right["quality"],
                "se": own.estimate(values).se if values is not None else se,
                "interpolated": True,
                "outcomes": values,
            }
    return None


def _seeds(values: Array, other: Array) -> Array:
    """As many seeds as the other side can be paired with: all, or their mean."""
    return values if len(values) == len(other) or len(other) == 1 else np.asarray(values.mean(axis=0, keepdims=True))


def significantly_best(table: DataFrame, groups: Mapping[tuple[str, str], Paired]) -> DataFrame:
    """For each model, task and sparsity of ``matched``: the best method, the second, their paired difference with its
    two-sided p, and whether the best is ahead of it (p < .05)."""
    from pandas import DataFrame

    rows = []
    for (model, task, at), here in table.groupby(["model", "task", "at"], sort=False):
        ranked = here.sort_values("quality", ascending=False, kind="stable").to_dict("records")
        row: dict[str, Any] = {"model": model, "task": task, "at": at, "best": ranked[0]["method"]}
        if len(ranked) > 1:
            first, second = ranked[:2]
            row |= {"second": second["method"], "difference": first["quality"] - second["quality"]}
            sides = first["outcomes"], second["outcomes"]
            if sides[0] is not None and sides[1] is not None and _alike(*sides):
                found = groups[model, task].estimate(sides[0] - sides[1])
                row["p"] = min(1.0, 2 * min(found.p_at_most(), found.p_at_least()))
        row["ahead"] = bool(row.get("p", 1.0) < 2 * ALPHA)
        rows.append(row)
    columns = ["model", "task", "at", "best", "second", "difference", "p", "ahead"]
    return DataFrame(rows, columns=columns).astype({"difference": float, "p": float, "ahead": bool})


def _alike(a: Array, b: Array) -> bool:
    """Whether seeds can be paired: as many on both sides, or one run for all."""
    return len(a) == len(b) or 1 in (len(a), len(b))


def safe(used: DataFrame, groups: Mapping[tuple[str, str], Paired], margin: float = curves.MARGIN) -> DataFrame:
    """The largest safe achieved sparsity of every model, task and method by both rules, with n and what it says.

    Empty where there is no dense run or there are no per-sample outcomes; then ``says`` tells which.
    """
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    needed = used[[*LEVEL, "run_id", "achieved"]]
    for (model, task), here in needed.groupby(["model_label", "task_label"], sort=False):
        own = groups.get((str(model), str(task)), Paired())
        dense = own.matrix(here.loc[here["method_label"] == DENSE, "run_id"].tolist()[:1])
        for method, level_rows in here[here["method_label"] != DENSE].groupby("method_label", sort=False):
            row: dict[str, Any] = {"model": model, "task": task, "method": method}
            levels = _levels(level_rows, own)
            if not (here["method_label"] == DENSE).any():
                rows.append({**row, "says": "no dense run to compare with"})
            elif dense is None or levels is None:
                rows.append({**row, "says": own.why or "a level has no per-sample outcomes"})
            else:
                seen, sure = curves.not_worse(dense, levels), curves.non_inferior(dense, levels, margin=margin)
                row |= {"not_worse": seen.level, "largest_passing": seen.largest_passing, "non_inferior": sure.level}
                rows.append({**row, "n": sure.n, "says": sure.says})
    columns = ["model", "task", "method", "not_worse", "largest_passing", "non_inferior", "n", "says"]
    return DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:7], float))


def _levels(rows: DataFrame, own: Paired) -> list[tuple[float, Array]] | None:
    found = []
    for _, level in rows.groupby("level", dropna=False, sort=False):
        values = own.matrix(level["run_id"].tolist())
        if values is None:
            return None
        found.append((float(level["achieved"].mean()), values))
    return found


def knees(table: DataFrame) -> DataFrame:
    """Where each curve bends, by all three rules, and what it keeps. ``table``: the levels, with quality and hollow.

    The hinge is given only where it is better than a straight line by AICc.
    """
    from pandas import DataFrame

    rows = []
    for (model, task), here in table[~table["hollow"]].groupby(["model", "task"], sort=False):
        dense = here[here["method"] == DENSE]
        for method, own in here[here["method"] != DENSE].groupby("method", sort=False):
            points = own.sort_values("achieved").drop_duplicates("achieved")
            points = points[points["achieved"] > 0]
            s = np.concatenate([dense["achieved"].to_numpy()[:1], points["achieved"].to_numpy()])
            q = np.concatenate([dense["quality"].to_numpy()[:1], points["quality"].to_numpy()])
            log = bool((own["metric"] == "perplexity").all())
            rows.append({"model": model, "task": task, "method": method, **_knees(s, q, len(dense) > 0, log)})
    columns = "model task method tolerance breakpoint sharpness hinge chord levels".split()
    return DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:8], float))


def _knees(s: Array, q: Array, has_dense: bool, log: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"levels": len(s)}
    if has_dense:
        found["tolerance"] = curves.tolerance_knee(s, q, curves.LOG_TOLERANCE if log else curves.TOLERANCE)
    if len(s) >= 3:
        broken = curves.breakpoint_knee(s, q)
        found |= {"breakpoint": broken.at, "sharpness": broken.sharpness, "chord": curves.chord_knee(s, q)}
    if len(s) >= 4:
        hinge = curves.hinge_knee(s, q)
        found["hinge"] = hinge.at if hinge.accepted else math.nan
    return found


def retention(table: DataFrame) -> DataFrame:
    """The mean share of the dense quality that each method keeps over the sparsities that all methods of its model
    and task reach (for a perplexity, dense log ppl / log ppl)."""
    from pandas import DataFrame

    rows = []
    for (model, task), here in table[~table["hollow"]].groupby(["model", "task"], sort=False):
        dense, own = here[here["method"] == DENSE], here[here["method"] != DENSE]
        kept = {str(name): one.sort_values("achieved") for name, one in own.groupby("method", sort=False)}
        kept = {name: one for name, one in kept.items() if len(one) > 1}
        if dense.empty or not kept or float(dense["score"].iloc[0]) == 0:  # of nothing there is no share
            continue
        try:
            interval = frontiers.common_interval([one["achieved"] for one in kept.values()])
        except ValueError:
            continue
        share = _reciprocal if bool((here["metric"] == "perplexity").all()) else _itself
        for name, one in kept.items():
            area = frontiers.retention_area(
                one["achieved"], share(one["score"]), float(share(dense["score"]).iloc[0]), interval
            )
            rows.append(
                {
                    "model": model,
                    "task": task,
                    "method": name,
                    "retention": area,
                    "from": interval[0],
                    "to": interval[1],
                }
            )
    return DataFrame(rows, columns=["model", "task", "method", "retention", "from", "to"])


def _itself(score: Any) -> Any:
    return score


def _reciprocal(score: Any) -> Any:
    return 1 / np.log(score)


def front(points: DataFrame, cost: str, groups: Mapping[tuple[str, str], Paired]) -> DataFrame:
    """``points`` of one task with ``front`` (not dominated by the means) and ``share`` of resamples on the front.

    Qualities are resampled over the samples that all points share; where they share none, as normal draws with each
    point's se. ``points``: columns cost, quality, se, model, task and run_ids.
    """
    found = points.copy()
    costs, quality = found[cost].to_numpy(float), found["quality"].to_numpy(float)
    found["front"] = frontiers.front(costs, quality)
    found["share"] = 0.0
    kept = _not_clearly_dominated(costs, quality, np.nan_to_num(found["se"].to_numpy(float)))
    resamples = min(_RESAMPLES, max(200, _LARGEST // max(1, int(kept.sum()))))
    chosen = found[kept]
    rows = [row_of(groups, row) for row in chosen[["model", "task", "run_ids"]].to_dict("records")]
    if all(row is not None for row in rows) and len({len(row) for row in rows if row is not None}) == 1:
        draws = frontiers.resampled(np.stack([row for row in rows if row is not None]), resamples)
    else:
        draws = frontiers.normal_draws(quality[kept], np.nan_to_num(chosen["se"].to_numpy(float)), resamples)
    found.loc[kept, "share"] = frontiers.front_shares(costs[kept], draws)
    return found


def row_of(groups: Mapping[tuple[str, str], Paired], row: Mapping[str, Any]) -> Array | None:
    values = groups.get((row["model"], row["task"]), Paired()).matrix(row["run_ids"])
    return None if values is None else np.asarray(values.mean(axis=0))


def _not_clearly_dominated(cost: Array, quality: Array, se: Array) -> Any:
    kept = np.ones(len(cost), dtype=bool)
    for at in range(len(cost)):
        margin = _CLEAR * np.hypot(se, se[at])
        kept[at] = not bool(((cost <= cost[at]) & (quality - quality[at] > np.maximum(margin, 1e-12))).any())
    return kept
