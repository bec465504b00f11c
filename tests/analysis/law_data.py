"""Synthetic data sets whose laws are known."""

from __future__ import annotations

import itertools

import numpy as np
from pandas import DataFrame

TRUTH = {"E": 1.2, "A": 20.0, "B": 150.0, "alpha": 0.30, "beta": 0.35}


def loss(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]


def noise(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(rows)


def grid(sigma: float, seed: int = 0) -> DataFrame:
    """Six sizes by five token counts."""
    n, d = np.repeat(1e5 * 2.0 ** np.arange(6), 5), np.tile(1e6 * 4.0 ** np.arange(5), 6)
    return DataFrame({"N": n, "D": d, "value": loss(n, d) * np.exp(sigma * noise(30, seed))})


def ray() -> DataFrame:
    """Ten sizes, each trained on 20 tokens a parameter: N and D cannot be told apart."""
    n = 1e5 * 2.0 ** np.arange(10)
    return DataFrame({"N": n, "D": 20 * n, "value": loss(n, 20 * n) * np.exp(0.003 * noise(10, 0))})


def pruned() -> DataFrame:
    """Sparse and dense pre-training: the loss follows the average parameter count."""
    rows = []
    for first, s, budget in itertools.product(1e5 * 2.0 ** np.arange(6), (0, 0.2, 0.4, 0.6, 0.8), (4, 16, 64)):
        d = 1 - s
        m = (1 - d) / np.log(1 / d) if s else 1.0
        t = (0.25, 0.5 / m, 0.25 / d)
        rho = (t[0] + t[1] * m + t[2] * d) / sum(t) if s else 1.0
        rows.append((first, first * rho, first * d, first * np.sqrt(d), budget * 1e6 / rho))
    points = DataFrame(rows, columns=["N_initial", "N_avg", "N_final", "geometric", "D"])
    value = loss(points["N_avg"].to_numpy(), points["D"].to_numpy()) * np.exp(0.003 * noise(90, 0))
    return points.assign(value=value)


def increasing(seed: int) -> DataFrame:
    d = 2.0 ** np.arange(10)
    return DataFrame({"D": d, "value": 0.40 - 0.12 / d**0.35 + 0.001 * noise(10, seed)})


def decreasing_truth(d: np.ndarray) -> np.ndarray:
    return np.exp(-1 - 0.45 * d**0.30) + 0.065


def decreasing(d: np.ndarray, seed: int) -> DataFrame:
    return DataFrame({"D": d, "value": decreasing_truth(d) + 0.001 * noise(len(d), seed)})


def accuracies(seed: int | None = None) -> DataFrame:
    """Five tasks by sizes, lengths and compressions; counts out of 100 with a seed, exact without."""
    tasks = {"quality": 0.0, "squad": 0.5, "cwe": -0.4, "tracking": -1.5, "toefl": 1.0}
    sizes, lengths, ratios = (5e5, 1e6, 2e6, 4e6), (128, 256, 512, 1024), (1, 1.5, 2, 3, 5, 7.5, 10, 20)
    cells = list(itertools.product(tasks, sizes, lengths, ratios))
    points = DataFrame(cells, columns=["task", "N", "L", "compression"])
    eta = points["task"].map(tasks) - 8 + 0.9 * np.log(points["N"])
    eta = eta - 0.5 * np.log(points["L"]) - 0.8 * np.log(points["compression"])
    p = 1 / (1 + np.exp(-eta.to_numpy()))
    return points.assign(value=p if seed is None else np.random.default_rng(seed).binomial(100, p) / 100)
