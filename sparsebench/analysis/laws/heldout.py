"""How well a law predicts a slice that it was not fitted to, task by task: the validation of The Sparse Frontier
(Nawrot et al. 2025, Tables 3, 4 and 7), which holds out the highest length, size or compression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsebench.analysis.laws.base import Array
from sparsebench.analysis.laws.compare import LeftOut

ALL = "all"


def by_category(left: LeftOut, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all of the slice, then one a name: left_out, lowest, task, n, r2, spearman, mae.

    ``names``: (n,) what each row that was left out belongs to. r2: 1 - squared error / variance of the slice, which is
    negative where its mean predicts better. r2 and spearman are None where they are not defined: fewer than three
    rows, or no spread. Empty when there is no prediction.
    """
    observed, predicted = np.array(left.observed), np.array(left.predicted)
    if len(observed) == 0:
        return []
    own = np.array(names)
    groups = [(ALL, np.ones(len(own), dtype=bool)), *((name, own == name) for name in dict.fromkeys(names))]
    facts = {"left_out": left.column, "lowest": left.lowest}
    return [{**facts, "task": name, **_agreement(observed[rows], predicted[rows])} for name, rows in groups]


def _agreement(observed: Array, predicted: Array) -> dict[str, Any]:
    from scipy.stats import spearmanr

    mae = float(np.mean(np.abs(predicted - observed)))
    spread = float(np.sum((observed - observed.mean()) ** 2))
    found: dict[str, Any] = {"n": len(observed), "r2": None, "spearman": None, "mae": mae}
    if len(observed) >= 3 and spread > 0:
        found["r2"] = 1 - float(np.sum((observed - predicted) ** 2)) / spread
        if np.ptp(predicted) > 0:
            rank = float(spearmanr(observed, predicted).statistic)
            found["spearman"] = rank if math.isfinite(rank) else None
    return found
