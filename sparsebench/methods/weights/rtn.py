"""RTN: every weight goes to the nearest level of a grid of few bits, group by group; no data, no update, no zeros.

A row is cut into groups of G consecutive inputs (a last shorter one is its own, a G beyond the row is the row). Per
group, with b bits,

    asymmetric   scale = (max - min) / (2^b - 1), zero = round(-min / scale), the range widened to hold 0
    symmetric    scale = max |w| / (2^(b-1) - 1), no zero point
    quantised    w' = scale * (clamp(round(w / scale) + zero, 0, 2^b - 1) - zero)

1.58 bits (three levels: -a, 0, a) and 1 bit (-a, a) are symmetric with a of a mean of |w|, as a grid that spans so few
levels from end to end would be far from most weights (``gqsa_groups.centred``).

It is the plain form that GPTQ (Frantar et al. 2022, arXiv 2210.17323) and its kind are compared with, and is here for
the quantised models of "When Reasoning Meets Compression" (Zhang et al. 2025, arXiv 2504.02010). Their *dynamic*
quantisation, more bits where they matter, is ``target_avg_bits`` (``method=dynamic_quant``): the average of stored bits
over ALL parameters of the model, which the bits of the low class are scaled to meet from below; ``bits.py`` has the
classes and what is counted. ``table`` sets single layers. How the paper's files were made is known second-hand only;
they need not be plainly rounded.

Quantised are the linear layers of the decoder blocks, experts too that a model stacks in one tensor; embedding and head
only by a target or where the table names them. The masked model holds exactly what is stored (``scale_bits`` for
scales). Rounding makes zeros that are stored like any code, so achieved sparsity is 0. Columns of the record:
``bits_average`` (over all parameters), ``bits_per_weight`` (over what was quantised), ``bits_of_layers`` (how many
layers got how many bits).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.kernels.stored import store
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.base import Layer, WeightMethod
from sparsebench.methods.weights.bits import AS_IT_IS, Form, Matrix, given, matrices_of, recipe, rules_of, to_average
from sparsebench.methods.weights.gqsa_groups import Grouped, count_of
from sparsebench.models.blocks import decoder_blocks


@dataclass(frozen=True)
class Plan:
    """What becomes of a model: ``forms`` of its matrices, by name; ``average``: stored bits over all parameters;
    ``cap``: what the recipe's bits had to come down to, None if they did not."""

    matrices: Mapping[str, Matrix]
    forms: Mapping[str, Form]
    average: float
    cap: float | None = None

    @property
    def rounded(self) -> list[tuple[Matrix, Form]]:
        """What does not stay as it is."""
        return [(self.matrices[name], form) for name, form in self.forms.items() if form.bits != AS_IT_IS]


@method(
    name="rtn",
    version=1,
    paper="Zhang et al. 2025, arXiv 2504.02010 (its quantised models), by plain rounding",
    target="weights",
    phase="once",
    stage="select",
    taxonomy=Taxonomy(
        object="none",
        granularity=("none",),
        when_mask_is_found="na",
        start="na",
        mask_dynamics="na",
        weights_updated_after_mask="closed_form",
        allocation="na",
        benefit_realised_on=("disk", "memory"),
        kernel_required="matrix product with quantised groups",
    ),
)
@dataclass(frozen=True)
class RTN(WeightMethod):
    """Rounds weights to the nearest level of few bits, the same everywhere or shared out to meet an average."""

    bits: float | None = option(
        None, "bits of the layers in scope; 4 if not given", choices=(1, 1.58, 2, 3, 4, 5, 6, 8)
    )
    target_avg_bits: float | None = option(
        None, "instead of bits: the average over all parameters, scales and zero points included", above=0.0, below=32.0
    )
    table: str | None = option(
        None,
        "a YAML or JSON file that maps patterns of layer names to bits, to {bits, group_size}, or to low: what "
        "target_avg_bits scales",
        unit="file",
    )
    group_size: int = option(128, "consecutive inputs G of a group, at most a row", low=4)
    symmetric: bool = option(False, "grids around 0, without zero points")
    scale_bits: int = option(16, "bits of a scale", choices=(16, 32))

    also_recovers: ClassVar[bool] = True  # what it does is done when the walk is over
    stores_zeros: ClassVar[bool] = True

    def check_model(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        if self.bits is not None and self.target_avg_bits is not None:
            raise UserError(f"bits={self.bits:g}: target_avg_bits finds the bits; give one of them")
        if not self.plan(model, layers).rounded:
            raise UserError(f"table={self.table}: leaves every layer as it is")

    def check_beside(self, others: Sequence[str]) -> None:
        if others:
            raise UserError(
                f"method: {others[0]} does not stack on rtn, which rounds for good; what it changes leaves the grids"
            )

    def touches(self, model: nn.Module, layers: Sequence[Layer]) -> set[str]:
        return {name for matrix, _ in self.plan(model, layers).rounded for name in matrix.touches}

    def plan(self, model: nn.Module, layers: Sequence[Layer]) -> Plan:
        """The form of every matrix. UserError when it cannot be as asked."""
        matrices = matrices_of(model, layers, self.in_scope)
        rules = rules_of(self.table, matrices) if self.table is not None else {}
        if self.target_avg_bits is None:  # embedding and head only where they are named
            matrices = [one for one in matrices if one.block is not None or one.name in rules]
        known = {one.name: one for one in matrices}

        def form(name: str, bits: float) -> Form:
            group = (rules[name].group if name in rules else None) or self.group_size
            return Form(bits, min(group, known[name].weight.shape[1]), self.symmetric or bits < 2, self.scale_bits)

        def takes(name: str, bits: float) -> int:
            return form(name, bits).takes(known[name].weight)

        everything = list(model.parameters())
        entries = sum(one.numel() for one in everything)
        rest = 8 * (sum(one.nbytes for one in everything) - sum(one.weight.nbytes for one in matrices))
        cap = None
        if self.target_avg_bits is None:
            chosen = given(known, rules, self.bits or 4.0, f"table={self.table}")
        else:
            wanted = recipe(matrices, len(decoder_blocks(model)[1]))
            chosen, cap = to_average(self.target_avg_bits, wanted, rules, takes, rest, entries)
        average = (rest + sum(takes(name, bits) for name, bits in chosen.items())) / entries
        return Plan(known, {name: form(name, bits) for name, bits in chosen.items()}, average, cap)

    def finish(self, layers: Sequence[Layer], around: Surroundings) -> dict[str, Any]:
        plan = self.plan(around.loaded.model, layers)
        taken = entries = groups = 0
        for matrix, form in plan.rounded:
            weight = matrix.weight
            groups_of_row = count_of(weight.shape[1], form.group)
            kept = torch.ones(len(weight), groups_of_row, dtype=torch.bool, device=weight.device)
            grouped = Grouped(weight, kept, form.group, form.bits, True, form.scale_bits, form.symmetric)
            grouped.freeze()
            weight.copy_(grouped(weight))
            stored = grouped.stored()
            for module in matrix.modules:
                store(module, stored, weight)
            taken, entries, groups = taken + stored.bits, entries + weight.numel(), groups + kept.numel()
        counts = Counter(form.bits for form in plan.forms.values())
        return {
            "bits_average": plan.average,
            "bits_per_weight": taken / entries,
            "bits_of_layers": ", ".join(f"{count} of {bits:g}" for bits, count in sorted(counts.items())),
            "groups_quantised": groups,
        }

    def rewrote(self, notes: Mapping[str, Any]) -> bool:
        return bool(notes["groups_quantised"])

    def remarks(self, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
        cap = self.plan(model, layers).cap
        if cap is None:
            return []
        return [
            f"rtn: target_avg_bits={self.target_avg_bits:g} leaves at most {cap:g} bits to attention, embedding, head "
            "and early down projections"
        ]
