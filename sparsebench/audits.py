"""What is checked on every sparse model before its scores count (after section E of the handbook of Liu and Wang 2023).

An audit that fails makes the run ``failed``; a finding that only deserves a look is a warning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebench.methods.base import Applied, LayerReport
from sparsebench.models.base import Read, as_it_is

Fingerprint = dict[str, str]


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


def fingerprint(model: nn.Module, read: Read = as_it_is) -> Fingerprint:
    """A hash of the bits of every parameter and buffer, to see what changed."""
    found = {name: _hash(read(name, parameter)) for name, parameter in model.named_parameters()}
    return found | {name: _hash(buffer) for name, buffer in model.named_buffers()}


def _hash(tensor: Tensor) -> str:
    # not torch.hash_tensor: an exclusive or over the elements, which an exchange of two weights or a
    # change of two signs leaves as it was
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def count(model: nn.Module, applied: Applied, read: Read = as_it_is) -> Achieved:
    """The achieved sparsity, counted exactly (== 0) on the stored weights of the reported layers, less the zeros
    that are stored as values."""
    rows: list[dict[str, object]] = []
    zeros = total = 0
    asked_zeros, asked_total = 0.0, 0
    for report in applied.layers:
        weight = _weight(model, report, read)
        found = int((weight == 0).sum()) - (report.spare if report.stores_zeros else 0)
        zeros, total = zeros + found, total + weight.numel()
        if report.asked is not None:
            asked_zeros, asked_total = asked_zeros + report.asked * weight.numel(), asked_total + weight.numel()
        row: dict[str, object] = {"layer": report.layer, "method": report.method, "asked": report.asked}
        row |= {"pattern": report.pattern, "achieved": found / weight.numel(), "zeros": found, "total": weight.numel()}
        rows.append(row)
    everything = sum(parameter.numel() for parameter in model.parameters())
    asked = asked_zeros / asked_total if asked_total else None
    scope = zeros / total if total else 0.0
    missed = asked is not None and abs(scope - asked) > applied.tolerance
    return Achieved(scope, zeros / everything, rows, asked, missed)


def audit(
    model: nn.Module,
    applied: Applied,
    achieved: Achieved,
    before: Fingerprint,
    data_free_of_change: bool,
    read: Read = as_it_is,
) -> list[Audit]:
    """All audits of a sparse model. ``before``: its fingerprint as it was loaded;
    ``data_free_of_change``: the stack asks for nothing, so every bit must be as before."""
    after = fingerprint(model, read)
    changed = {name for name, value in after.items() if before.get(name) != value}
    found = [_zeros(report, _weight(model, report, read)) for report in applied.layers]
    checks = [Audit("exact_zeros", not any(found), "; ".join(filter(None, found))[:500])]
    outside = sorted(changed - applied.acts_on)
    checks.append(Audit("excluded_untouched", not outside, f"changed: {', '.join(outside[:5])}" if outside else ""))
    broken = [text for report in applied.layers if (text := _pattern(model, report, read))]
    checks.append(Audit("pattern_n_of_m", not broken, "; ".join(broken)[:500]))
    if data_free_of_change:
        checks.append(
            Audit("zero_equals_dense", not changed, f"changed: {', '.join(sorted(changed)[:5])}" if changed else "")
        )
    if achieved.asked:
        # by what the masks removed: zeros that the model came with are nobody's act
        acted = achieved.scope > 0 and any(report.pruned for report in applied.layers)
        checks.append(Audit("acted", acted, f"asked {achieved.asked:g}, achieved {achieved.scope:g}"))
    wild = [name for name, one in model.named_parameters() if not bool(torch.isfinite(read(name, one)).all())]
    checks.append(Audit("finite_weights", not wild, f"not finite: {', '.join(wild[:5])}" if wild else ""))
    return checks


def findings(model: nn.Module, applied: Applied, achieved: Achieved) -> Iterator[str]:
    """Warnings: layers without a weight left, and a level that was missed."""
    yield from applied.warnings
    empty = [str(row["layer"]) for row in achieved.layers if row["zeros"] == row["total"]]
    if empty:
        yield f"no weight left in {len(empty)} layers: {', '.join(empty[:3])}"
    if achieved.missed:
        yield f"asked sparsity {achieved.asked:.6g}, achieved {achieved.scope:.6g}"


def _weight(model: nn.Module, report: LayerReport, read: Read) -> Tensor:
    name = f"{report.layer}.weight"
    return read(name, model.get_parameter(name))


def _zeros(report: LayerReport, weight: Tensor) -> str:
    found = int((weight == 0).sum())
    wanted = report.pruned + report.spare
    return "" if found == wanted else f"{report.layer}: {found} zeros, the masks say {wanted}"


def _pattern(model: nn.Module, report: LayerReport, read: Read) -> str:
    if report.pattern == "unstructured":
        return ""
    kept, group = map(int, report.pattern.split(":"))
    weight = _weight(model, report, read)
    groups = weight.shape[1] // group
    if groups == 0:
        return ""
    nonzero = (weight[:, : groups * group] != 0).reshape(weight.shape[0], groups, group).sum(dim=2)
    most = int(nonzero.max())
    return f"{report.layer}: a group of {group} inputs keeps {most}, not {kept}" if most > kept else ""
