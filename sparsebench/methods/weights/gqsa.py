"""GQSA: group quantisation and sparsity (Zeng, Liu, Yang, Chen, Mei, Fu 2024, arXiv 2412.17560).

A weight matrix is cut into groups of G consecutive inputs of one row. With H the damped Hessian of the layer's
inputs, as in SparseGPT,

    element    e_ij = w_ij^2 / ([H^-1]_jj)^2              saliency=obs (obs1: [H^-1]_jj; wanda, magnitude)
    group      mean of e over it; the round(s * groups) smallest groups go
    kept       q = clamp(round(w / scale) + zero, 0, 2^b - 1),   w' = scale * (q - zero),   per group

and two stages recover: BQPO trains the kept weights, scales and zero points of each block on its dense outputs,
straight through the rounding; E2E-OQP freezes q and trains scale and zero on the language-model loss. The mask
never changes. Calibration sees the compressed blocks before, as in SparseGPT.

Sparsity counts removed groups over all groups (a kept group counts as dense, whatever rounds to zero in it) of the
linear layers of the decoder blocks. Scales and zero points are stored in ``scale_bits`` and the masked model holds
exactly what is stored; zero points stay whole through BQPO and are tuned as continuous numbers by E2E-OQP. The
paper's body was not at hand: G, the saliency, the comparison set, schedules and which inputs BQPO sees are options
or, like AdamW with a cosine (BQPO) and a linear (E2E) decay, taken from its kind (EfficientQAT). Saliency is 0 for
inputs that calibration never saw. A last shorter group of a row is a group of its own (``remainder``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.kernels.stored import store
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import masks
from sparsebench.methods.weights.base import BlockRun, Layer, Pruner
from sparsebench.methods.weights.gqsa_groups import Grouped, Load, count_of, gather, means, spread
from sparsebench.methods.weights.gqsa_recovery import BlockStage, train_grids
from sparsebench.methods.weights.hessian import Hessian
from sparsebench.methods.weights.statistics import InputNorm, Statistic


@dataclass
class Progress:
    """What one walk has got to: the compressed layers by name, and the dense model's hidden states in front of the
    next block."""

    layers: dict[str, Grouped] = field(default_factory=dict)
    dense: list[Tensor] | None = None
    steps: int = 0
    seconds: float = 0.0


@method(
    name="gqsa",
    version=1,
    paper="Zeng et al. 2024, arXiv 2412.17560",
    target="weights",
    phase="once",
    stage="select",
    uses=("calibration", "seed"),
    baseline="magnitude",
    taxonomy=Taxonomy(
        object="weights",
        granularity=("block",),
        when_mask_is_found="after_training",
        weights_updated_after_mask="finetune",
        data_need="calibration",
        kernel_required="block-sparse row product with 4-bit groups",
        training_cost_claim="cheaper_than_dense",
    ),
)
@dataclass(frozen=True)
class GQSA(Pruner):
    """Removes groups of inputs, rounds the kept ones to a grid each, and recovers in two stages."""

    pattern: str | None = option(None, "whole groups go; n:m does not apply", choices=("unstructured",))
    remainder: str = option(
        "group",
        "columns behind the last whole group of a row: a shorter group, or refuse the layer",
        choices=("group", "refuse"),
    )
    group_size: int = option(16, "consecutive inputs G of a group", low=4, high=128)
    wbits: int = option(4, "bits of the kept weights (16: not quantised)", choices=(2, 3, 4, 5, 6, 7, 8, 16))
    saliency: str = option(
        "obs", "what a weight is worth (obs1: the exact OBS form)", choices=("obs", "obs1", "wanda", "magnitude")
    )
    compare: str = option("layer", "groups that are compared with each other", choices=("layer", "row", "global"))
    percdamp: float = option(0.01, "damping of the Hessian, as a share of its mean diagonal", above=0.0, high=1.0)
    include_zero: bool = option(False, "every grid spans 0, so that its zero point fits a code until E2E-OQP")
    scale_bits: int = option(16, "bits of scale and zero point (32: constant groups are exact)", choices=(16, 32))
    bqpo_enable: bool = option(True, "stage 1: train each block on its dense outputs")
    bqpo_epochs: int = option(2, "passes over the data", low=1)
    bqpo_lr_w: float = option(1e-5, "learning rate of the kept weights", above=0.0)
    bqpo_lr_q: float = option(1e-4, "learning rate of scales and zero points", above=0.0)
    bqpo_batch: int = option(2, "sequences of a step", low=1)
    bqpo_nsamples: int = option(128, "calibration sequences, of those that there are", low=1)
    bqpo_input: str = option(
        "compressed", "what the trained block sees: the compressed or the dense prefix", choices=("compressed", "dense")
    )
    e2e_enable: bool = option(True, "stage 2: train scales and zero points on the language-model loss")
    e2e_epochs: int = option(1, "passes over the calibration data", low=1)
    e2e_lr: float = option(2e-5, "learning rate of scales and zero points", above=0.0)
    e2e_batch: int = option(2, "sequences of a step", low=1)
    kernel_workers: int = option(132, "workers that the kept groups are shared out to (imbalance)", low=1)
    progress: Progress = field(default_factory=Progress, init=False, repr=False, compare=False)

    also_recovers: ClassVar[bool] = True
    stores_zeros: ClassVar[bool] = True

    # which groups go

    def statistic(self) -> Callable[[], Statistic] | None:
        return {"wanda": InputNorm, "magnitude": None}.get(self.saliency, Hessian)

    @property
    def order(self) -> str:
        return "none" if self.compare == "global" else "block"

    @property
    def wants_inputs(self) -> bool:
        return self.bqpo_enable

    def check(self, layers: Sequence[Layer]) -> None:
        super().check(layers)
        if self.rule != "uniform" and self.compare == "global":
            raise UserError(f"allocation={self.rule}: compare=global finds the level of each layer itself")
        for layer in layers:
            columns = layer.weight.shape[1]
            if self.group_size > columns:
                raise UserError(
                    f"method.gqsa.group_size={self.group_size}: larger than the {columns} inputs of {layer.name}; "
                    "exclude it or take smaller groups"
                )
            if self.remainder == "refuse" and columns % self.group_size:
                raise UserError(
                    f"method.gqsa.group_size={self.group_size}: does not divide the {columns} inputs of {layer.name}; "
                    "exclude it, or make the rest a shorter group with remainder=group"
                )

    def check_beside(self, others: Sequence[str]) -> None:
        if others:
            raise UserError(
                f"method=[gqsa,{others[0]}]: gqsa recovers by itself; what {others[0]} changes would leave its grids"
            )

    def element_saliency(self, layer: Layer) -> Tensor:
        """e: (out, in) float32."""
        weight = layer.weight.float()
        if self.saliency == "magnitude":
            return weight.abs()
        if self.saliency == "wanda":
            norm: InputNorm = layer.statistic
            return weight.abs() * norm.scale
        hessian: Hessian = layer.statistic
        inverse = hessian.factor(self.percdamp, "gqsa").square().sum(dim=0)  # H^-1 = U^T U: its diagonal
        if hessian.damping_used != self.percdamp:
            layer.warnings.append(
                f"Hessian not positive definite with percdamp={self.percdamp:g}, damped by {hessian.damping_used:g}"
            )
        scores = weight**2 / (inverse**2 if self.saliency == "obs" else inverse)
        return scores.masked_fill(hessian.dead, 0.0)

    def group_saliency(self, layer: Layer) -> Tensor:
        """The mean of e over each group: (out, n) float32."""
        return means(self.element_saliency(layer), self.group_size)

    def select(self, layer: Layer) -> Tensor:
        scores, level = self.group_saliency(layer), self.level_of(layer)
        if self.compare == "row":
            count = scores.shape[1]
            kept = masks.keep_rows(scores, (round(level * count) + 0.5) / count)  # truncated there
        else:
            kept = masks.keep_count(scores, round(level * scores.numel()))
        return spread(kept, self.group_size, layer.weight.shape[1])

    def select_all(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        if self.compare != "global":
            return {}
        kept = masks.keep_global({layer.name: self.group_saliency(layer) for layer in layers}, self.level)
        return {one.name: spread(kept[one.name], self.group_size, one.weight.shape[1]) for one in layers}

    def tolerance(self, layers: Sequence[Layer]) -> float:
        """What rounding to whole groups makes, and, where groups are not all of one size, which of them went."""
        total = sum(layer.weight.numel() for layer in layers)
        counts = {layer.name: count_of(layer.weight.shape[1], self.group_size) for layer in layers}
        rows = sum(layer.weight.shape[0] for layer in layers)
        roundings = {"layer": len(layers), "row": rows, "global": 1}[self.compare]
        uneven = 0.0  # entries that went, beyond those that as many groups of the average size would have
        for layer in layers:
            if layer.mask is not None:
                groups = int((~gather(layer.mask, self.group_size)).sum())
                uneven += int((~layer.mask).sum()) - groups * layer.weight.shape[1] / counts[layer.name]
        return 1e-9 + (roundings * self.group_size / 2 + abs(uneven)) / total

    # grids and recovery

    def prepare(self, layers: Sequence[Layer]) -> None:
        super().prepare(layers)
        object.__setattr__(self, "progress", Progress())

    def observe(self, run: BlockRun) -> tuple[BlockRun, list[Tensor]] | None:
        """What the block sees and puts out in the dense model."""
        if not self.bqpo_enable or run.inputs is None:
            return None
        hidden = run.inputs.hidden if self.progress.dense is None else self.progress.dense
        dense = BlockRun(run.block, run.index, replace(run.inputs, hidden=hidden))
        self.progress.dense = dense()
        return dense, self.progress.dense

    def recover(
        self, block: nn.Module, layers: Sequence[Layer], seen: tuple[BlockRun, list[Tensor]] | None, run: BlockRun
    ) -> Mapping[str, float] | None:
        started = time.perf_counter()
        inside = {id(module): f"{name}.weight" for name, module in block.named_modules()}
        made: dict[str, Grouped] = {}
        for layer in layers:
            if layer.mask is not None:
                kept = gather(layer.mask, self.group_size)
                grouped = Grouped(layer.weight, kept, self.group_size, self.wbits, self.include_zero, self.scale_bits)
                made[inside[id(layer.module)]] = self.progress.layers[layer.name] = grouped
        notes: dict[str, float] = {}
        if seen is not None and made:
            dense, targets = seen
            stage = BlockStage(self.bqpo_epochs, self.bqpo_lr_w, self.bqpo_lr_q, self.bqpo_batch, self.bqpo_nsamples)
            chosen = dense if self.bqpo_input == "dense" else run
            notes |= stage.train(made, chosen, targets, layers[0].generator)
            self.progress.steps += int(notes.pop("recovery_steps"))
        for layer in layers:
            self._write(layer)
        self.progress.seconds += time.perf_counter() - started
        return notes

    def _write(self, layer: Layer) -> None:
        """Gives the layer its compressed weight, from here on with whole codes."""
        if layer.name in self.progress.layers:
            grouped = self.progress.layers[layer.name]
            grouped.freeze()
            layer.weight.copy_(grouped(layer.weight))

    def finish(self, layers: Sequence[Layer], around: Surroundings) -> dict[str, Any]:
        started, found, notes = time.perf_counter(), self.progress.layers, dict[str, Any]()
        if self.e2e_enable and self.wbits < 16:
            adapters = {f"{name}.weight": grouped for name, grouped in found.items()}
            losses = train_grids(adapters, around, self.e2e_epochs, self.e2e_lr, self.e2e_batch)
            tenth = max(1, len(losses) // 10)
            notes["recovery_loss_first"] = sum(losses[:tenth]) / tenth
            notes["recovery_loss_last"] = sum(losses[-tenth:]) / tenth
            self.progress.steps += len(losses)
        for layer in layers:
            self._write(layer)
        if self.progress.steps:
            notes["recovery_steps"] = self.progress.steps
            notes["seconds_recover"] = self.progress.seconds + time.perf_counter() - started
        return notes | self._storage(layers)

    def rewrote(self, notes: Mapping[str, Any]) -> bool:
        return bool(notes.get("recovery_steps") or notes["groups_quantised"])

    def _storage(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """Columns: bits per weight of the scope, groups, imbalance; each module takes its stored form along."""
        bits, loads = 0, []
        for layer in layers:
            grouped = self.progress.layers[layer.name]
            form = grouped.stored()
            store(layer.module, form, layer.weight)
            bits += form.bits
            loads.append(Load.of(grouped.kept, self.kernel_workers))
        kept = sum(int(grouped.kept.sum()) for grouped in self.progress.layers.values())
        mean = sum(load.mean for load in loads)
        return {
            "bits_per_weight": bits / sum(layer.weight.numel() for layer in layers),
            "groups_kept": kept,
            "groups_quantised": kept if self.wbits < 16 else 0,
            "imbalance_rows": sum(load.rows for load in loads) / mean if mean else None,
            "imbalance_tasks": sum(load.tasks for load in loads) / mean if mean else None,
        }

    def remarks(self, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
        idle = self.e2e_enable and self.wbits == 16
        return ["gqsa: stage 2 trains nothing, 16-bit weights have no scales"] if idle else []
