"""Several tasks as one: the mean over tasks of every point, and the safe sparsities of a method over its tasks.

Task labels begin with the task's name; labels that agree in what follows (a length, a protocol) are one *setting*, over
whose tasks is averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsebench.analysis import curves
from sparsebench.analysis.statistics import Array
from sparsebench.reports.data import DENSE, is_logged

if TYPE_CHECKING:
    from pandas import DataFrame, Series

MOST = 6  # task labels up to which each has its own figures of costs
_ALL = "all tasks"
_POINT = ["setting", "model", "method", "requested", "pattern"]


def setting_of(label: str) -> str:
    """What follows the task's name in its label."""
    return label.partition(" ")[2] or _ALL


def pooled(points: DataFrame, costs: Sequence[str]) -> DataFrame:
    """``points`` with a row for each setting in place of its tasks: the means of achieved, quality and costs, se of the
    mean of independent tasks, n samples in all, ``tasks`` how many, ``task`` the setting. A perplexity's score is that
    of the mean quality, others' the mean score; the interval is not known where that of a task without a spread is not.

    Only points that count and are there for every task of their setting and model. Empty when no setting has two tasks,
    or tasks differ in their metric.
    """
    kept = points[~points["hollow"]].assign(setting=points["task"].map(setting_of))
    if kept.empty or kept["metric"].nunique() > 1:
        return kept.iloc[:0].assign(tasks=0)
    wanted = kept.groupby(["setting", "model"])["task"].nunique()
    rows: list[dict[str, Any]] = []
    for key, own in kept.groupby(_POINT, dropna=False, sort=False):
        if len(own) < max(2, wanted[key[0], key[1]]):
            continue
        first = own.iloc[0]
        means = {name: float(own[name].mean()) for name in ("achieved", "quality", "score", *costs)}
        errors = own["se"].to_numpy(float)
        se = float(np.sqrt((errors**2).sum()) / len(own))
        logged = is_logged(str(first["metric"]))
        down, up = (_reach(errors, None if logged else abs(own[end] - own["score"])) for end in ("ci_low", "ci_high"))
        low, high = means["score"] - down, means["score"] + up
        if logged:
            means["score"], low, high = (float(np.exp(-means["quality"] + one)) for one in (0.0, -down, up))
        same = {name: first[name] for name in ("model", "method", "requested", "pattern", "base", "metric", "better")}
        rows.append(
            {
                **same, **means, "task": key[0], "se": se, "tasks": len(own), "n": int(own["n"].sum()),
                "ci_low": low, "ci_high": high, "interval": "normal" if np.isfinite(down + up) else "unknown",
                "seeds": int(first["seeds"]), "hollow": False, "flags": "",
                "run_ids": [one for ids in own["run_ids"] for one in ids],
            }
        )  # fmt: skip
    from pandas import DataFrame

    return DataFrame(rows, columns=[*points.columns, "tasks"])


def saves(points: DataFrame, cost: str) -> bool:
    """Whether any sparse point costs something else than its model's dense one."""
    dense = points[points["method"] == DENSE].groupby(["model", "task"])[cost].first()
    sparse = points[points["method"] != DENSE]
    base = [dense.get((model, task), np.nan) for model, task in zip(sparse["model"], sparse["task"], strict=True)]
    return bool((~np.isclose(sparse[cost].to_numpy(float), np.array(base, float), rtol=1e-6, equal_nan=True)).any())


def equal_costs(points: DataFrame, cost: str, models: Sequence[str]) -> DataFrame:
    """Neighbouring sizes at the smaller one's dense cost: task, model, larger, cost, dense (the smaller's quality),
    method, achieved and quality of the larger's best point that costs no more, and ``cheapest``: the larger's lowest
    cost over that cost. Where every point of the larger costs more, there is no method, and nothing is interpolated.

    ``models``: the sizes, the smallest first.
    """
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for task, here in points.groupby("task", sort=False):
        if not saves(here, cost):
            continue
        for small, large in itertools.pairwise(models):
            dense = here[(here["model"] == small) & (here["method"] == DENSE)]
            own = here[(here["model"] == large) & here[cost].notna()]
            if dense.empty or own.empty:
                continue
            at, quality = float(dense[cost].iloc[0]), float(dense["quality"].iloc[0])
            row = {"task": task, "model": small, "larger": large, "cost": at, "dense": quality}
            row["cheapest"] = float(own[cost].min()) / at
            within = own[own[cost] <= at * (1 + 1e-9)].sort_values("quality", ascending=False, kind="stable")
            if len(within):
                best = within.iloc[0]
                row |= {"method": best["method"], "achieved": best["achieved"], "quality": best["quality"]}
            rows.append(row)
    columns = ["task", "model", "larger", "cost", "dense", "method", "achieved", "quality", "cheapest"]
    return DataFrame(rows, columns=columns)


def safe_over_tasks(safe: DataFrame) -> DataFrame:
    """The safe levels of every model, method and setting over its tasks: mean, std, the minimum and the task it is of,
    by both rules. A task that fails at once counts 0; one with too few samples to tell is left out of non_inferior:
    ``decided`` of the ``tasks`` have one (none: no numbers, no task). ``safe``: of ``levels.safe``."""
    from pandas import DataFrame

    tested = safe.assign(
        non_inferior=_decided(safe), **{rule: safe[rule].fillna(0.0) for rule in ("not_worse", "largest_passing")}
    )
    tested = tested[tested["n"].notna()]
    tested = tested.assign(setting=tested["task"].map(setting_of), name=tested["task"].str.partition(" ")[0])
    rows: list[dict[str, Any]] = []
    for (model, method, setting), own in tested.groupby(["model", "method", "setting"], sort=False):
        row: dict[str, Any] = {"model": model, "method": method, "setting": setting, "tasks": len(own)}
        row["decided"] = int(own["non_inferior"].count())
        for rule in ("not_worse", "largest_passing", "non_inferior"):
            known = own[own[rule].notna()]
            found = {"mean": np.nan, "std": np.nan, "minimum": np.nan, "task": ""}
            if len(known):
                found = curves.over_tasks(dict(zip(known["name"], known[rule], strict=True)))
            row |= {f"{rule}_{name}": found[name] for name in ("mean", "std", "minimum", "task")}
        rows.append(row)
    return DataFrame(rows)


def safe_minimum(safe: DataFrame) -> DataFrame:
    """The non-inferior level of every method over its models and tasks: method, mean, min, ``decided`` (how many of
    them have one; a cell that fails at once has 0) and ``cells`` (how many there are). ``safe``: of ``levels.safe``.
    """
    levels = _decided(safe).groupby(safe["method"], sort=False)
    return levels.agg(mean="mean", min="min", decided="count", cells="size").reset_index()


def _decided(safe: DataFrame) -> Series[float]:
    """The non-inferior level of each cell: 0 where the first one tested fails, not a number where the samples are too
    few to tell, or nothing was tested."""
    told = safe["n"].notna() & ~safe["says"].str.startswith(curves.TOO_FEW)
    return safe["non_inferior"].fillna(0.0).where(told)


def _reach(errors: Array, ends: Any) -> float:
    """How far the interval of a mean of independent tasks reaches to one side. ``errors``: their standard errors;
    ``ends``: how far their own intervals reach, which end where scores do, and are all there is without a spread."""
    alone = np.full_like(errors, np.nan) if ends is None else np.asarray(ends, float)
    each = np.where(errors > 0, np.fmin(1.96 * errors, alone), alone)
    return float(np.sqrt((each**2).sum()) / len(each))
