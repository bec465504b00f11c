"""The frontier law: how accuracy under sparse attention depends on size, length and compression (Nawrot et al. 2025,
"The Sparse Frontier", Table 3): logit(accuracy) = eps + delta_task + alpha ln N + beta ln L + gamma ln(compression).

Two losses: ``binomial`` (default), the likelihood of the successes out of the rows' samples, and ``ols``, the paper's
recipe: least squares on logits of accuracies clipped to [clip, 1 - clip]. That the paper means logits, natural
logarithms and a clip of 1e-6 is inferred from its coefficients, not printed there. The recipe depends on the clip
(with 1e-6 and 100 samples it is biased), so it is part of the fit. The compressions of one (model, task, length) share
their samples and are resampled together. That is the cell as a whole, not its samples: the table holds no outcomes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsebench.analysis.laws.base import Array, Columns, Law, Parameter, Values

_FREE = Parameter(low=-np.inf, positive=False)
_SLOPE = replace(_FREE, exponent=True)
_VARIABLES = {"alpha": "N", "beta": "L", "gamma": "compression"}  # slope -> its variable


def _design(parameters: list[str], x: Columns) -> dict[str, Array]:
    """parameter -> what it is multiplied by in the logit."""
    found = {"eps": np.ones(len(x["N"]))}
    found |= {slope: np.log(x[variable]) for slope, variable in _VARIABLES.items()}
    found |= {name: (x["task"] == name[6:]).astype(np.float64) for name in parameters if name.startswith("delta_")}
    return found


def _curve(p: Values, x: Columns) -> Array:
    columns = _design(list(p), x)
    return np.asarray(np.sum([p[name] * column for name, column in columns.items()], axis=0))


def _slopes(p: Values, x: Columns) -> dict[str, Array]:
    return _design(list(p), x)


def _rescale(p: Values, c: Values) -> dict[str, float]:
    return {**p, "eps": p["eps"] - sum(p[slope] * c[variable] for slope, variable in _VARIABLES.items())}


def _bind(law: Law, x: Columns) -> Law:
    """One delta per task; the first task of the data is the reference, its delta 0."""
    tasks = list(dict.fromkeys(map(str, x["task"])))[1:]
    parameters = {**FRONTIER.parameters, **{f"delta_{task}": _FREE for task in tasks}}
    return replace(law, parameters=parameters, starts=lambda x, y: [dict.fromkeys(parameters, 0.0)])


FRONTIER = Law(
    name="frontier",
    formula="logit(acc) = eps + delta_task + alpha ln N + beta ln L + gamma ln(compression)",
    variables={
        "N": "parameters",
        "L": "sequence length, tokens",
        "compression": "1 / (1 - sparsity)",
        "task": "name of the task",
    },
    parameters={"eps": _FREE, "alpha": _SLOPE, "beta": _SLOPE, "gamma": _SLOPE},
    link="logit",
    curve=_curve,
    starts=lambda x, y: [],
    slopes=_slopes,
    rescale=_rescale,
    loss="binomial",
    categories=("task",),
    cluster=("N", "task", "L"),
    values=(0.0, 1.0),
    bind=_bind,
)
