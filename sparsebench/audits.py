"""What is checked on every sparse model before its scores count (section E of the handbook sheet).

An audit that fails makes the run ``failed``; a finding that only deserves a look is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebench.methods.base import Applied, LayerReport

Fingerprint = dict[str, int]


@dataclass(frozen=True)
class Audit:
    """One check: its name, whether it held, and what was seen."""

    name: str
    held: bool
    detail: str = ""


@dataclass(frozen=True)
class Achieved:
    """Zeros counted on the result: over the scope, over all parameters, and per layer."""

    scope: float
    model: float
    layers: list[dict[str, object]]
    asked: float | None
    missed: bool


def fingerprint(model: nn.Module) -> Fingerprint:
    """A hash of the bits of every parameter and buffer, to see what changed."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: int(torch.hash_tensor(tensor.detach()).item()) for name, tensor in tensors}


def count(model: nn.Module, applied: Applied) -> Achieved:
    """The achieved sparsity, counted exactly (== 0) on the stored weights of the reported layers."""
    rows: list[dict[str, object]] = []
    zeros = total = 0
    asked_zeros, asked_total = 0.0, 0
    for report in applied.layers:
        weight = model.get_submodule(report.layer).weight
        found = int((weight == 0).sum())
        zeros, total = zeros + found, total + weight.numel()
        if report.asked is not None:
            asked_zeros, asked_total = asked_zeros + report.asked * weight.numel(), asked_total + weight.numel()
        row = {"layer": report.layer, "method": report.method, "asked": report.asked, "pattern": report.pattern}
        rows.append(row | {"achieved": found / weight.numel(), "zeros": found, "total": weight.numel()})
    everything = sum(parameter.numel() for parameter in model.parameters())
    asked = asked_zeros / asked_total if asked_total else None
    scope = zeros / total if total else 0.0
    missed = asked is not None and abs(scope - asked) > applied.tolerance
    return Achieved(scope, zeros / everything, rows, asked, missed)


def audit(model: nn.Module, applied: Applied, achieved: Achieved, before: Fingerprint, data_free_of_change: bool) -> list[Audit]:
    """All audits of a sparse model. ``before``: its fingerprint as it was loaded;
    ``data_free_of_change``: the stack asks for nothing, so every bit must be as before."""
    after = fingerprint(model)
    changed = {name for name, value in after.items() if before.get(name) != value}
    found = [_zeros(model, report) for report in applied.layers]
    checks = [Audit("exact_zeros", not any(found), "; ".join(filter(None, found))[:500])]
    outside = sorted(changed - applied.acts_on)
    checks.append(Audit("excluded_untouched", not outside, f"changed: {', '.join(outside[:5])}" if outside else ""))
    broken = [text for report in applied.layers if (text := _pattern(model, report))]
    checks.append(Audit("pattern_n_of_m", not broken, "; ".join(broken)[:500]))
    if data_free_of_change:
        checks.append(Audit("zero_equals_dense", not changed, f"changed: {', '.join(sorted(changed)[:5])}" if changed else ""))
    if achieved.asked:
        checks.append(Audit("acted", achieved.scope > 0, f"asked {achieved.asked:g}, achieved {achieved.scope:g}"))
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    checks.append(Audit("finite_weights", all(bool(torch.isfinite(w).all()) for w in weights)))
    return checks


def findings(model: nn.Module, applied: Applied, achieved: Achieved) -> Iterator[str]:
    """Warnings: layers without a weight left, and a level that was missed."""
    yield from applied.warnings
    empty = [str(row["layer"]) for row in achieved.layers if row["zeros"] == row["total"]]
    if empty:
        yield f"no weight left in {len(empty)} layers: {', '.join(empty[:3])}"
    if achieved.missed:
        yield f"asked sparsity {achieved.asked:.6g}, achieved {achieved.scope:.6g}"


def _zeros(model: nn.Module, report: LayerReport) -> str:
    found = int((model.get_submodule(report.layer).weight == 0).sum())
    wanted = report.pruned + report.spare
    return "" if found == wanted else f"{report.layer}: {found} zeros, the masks say {wanted}"


def _pattern(model: nn.Module, report: LayerReport) -> str:
    if report.pattern == "unstructured":
        return ""
    kept, group = map(int, report.pattern.split(":"))
    weight: Tensor = model.get_submodule(report.layer).weight
    whole = weight.shape[1] // group * group
    nonzero = (weight[:, :whole] != 0).view(weight.shape[0], -1, group).sum(dim=2)
    return f"{report.layer}: a group of {group} inputs keeps {int(nonzero.max())}, not {kept}" if int(nonzero.max()) > kept else ""
