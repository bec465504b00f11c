"""PERP: retraining a small part of a pruned model (Zimmer, Andoni, Spiegel, Pokutta 2023, arXiv 2312.15230).

With W the pruned weight, M its mask (True = kept), s = alpha / r, A (r, in) and B (out, r), the linear
layers learn through one of

    mask_lora    y = x (W + s M * (B A))^T     merges as it is
    scale_lora   y = x (W * (B A))^T           merges as it is; starts at B A = 1
    lora_prune   y = x (W + s B A)^T           merges as W + M * (s B A): what falls on pruned entries is lost

beside the biases and the gains and offsets of the norms; everything else is frozen. M is the mask of the
pruning, not W != 0, so a kept zero can learn and a pruned entry stays exactly zero. (The paper's plain
LoRA cannot be merged into a sparse weight; only the head, which is dense, has it.) Training is in
float32, the merge is made in float32 and cast.

``training_mode=retrain`` minimises the language-model loss of the whole model on the calibration
sequences (AdamW, warm-up and linear decay); ``reconstruct`` trains each block right after it is pruned

    min  mean ( block(X) - Y )^2,   Y = the dense block's output on the same X, the pruned prefix's output

on mini-batches in fixed order. The sparsity is that of the pruner before it in the stack.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.adapters import LORA_TYPES, Adapted, Adapter, LoRA, Own, adapting
from sparsebench.methods.weights.base import BlockRun, Layer, WeightMethod
from sparsebench.models.blocks import decoder_blocks, take_rows
from sparsebench.trainer import Batch, Hook, TrainConfig, Trainer


@method(
    name="perp",
    version=1,
    paper="Zimmer et al. 2023, arXiv 2312.15230",
    target="weights",
    phase="once",
    stage="recover",
    uses=("calibration", "seed"),
    taxonomy=Taxonomy(
        object="weights",
        granularity=("none",),
        when_mask_is_found="na",
        start="na",
        mask_dynamics="na",
        weights_updated_after_mask="finetune",
        data_need="calibration",
        allocation="na",
        training_cost_claim="cheaper_than_dense",
        inference_cost_claim="none",
    ),
)
@dataclass(frozen=True)
class Perp(WeightMethod):
    """Retrains biases, norms and masked low-rank updates of a pruned model, then merges them."""

    training_mode: str = option(
        "retrain",
        "retrain: the whole model on the language-model loss; reconstruct: each block on its dense outputs",
        choices=("retrain", "reconstruct"),
    )
    train_bias: bool = option(True, "train the biases of all modules (nothing where the model has none)")
    train_norm: bool = option(True, "train the gains and offsets of the norms")
    train_lora: bool = option(True, "train a low-rank update of every pruned linear layer")
    train_head_lora: bool = option(
        False, "train a low-rank update of an untied output head", only="training_mode=retrain"
    )
    lora_type: str = option(
        "mask_lora",
        "how the low-rank update meets the mask (plain LoRA would fill it when merged)",
        choices=("mask_lora", "scale_lora", "lora_prune"),
    )
    rank: int = option(16, "rank r of the low-rank updates", low=1)
    alpha: float = option(32.0, "low-rank updates are scaled by alpha / rank (not scale_lora)", above=0.0)
    n_iterations: int = option(1000, "optimiser steps, of the model or of each block", low=1)
    lr: float = option(5e-4, "peak learning rate of AdamW", above=0.0)
    batch_size: int = option(2, "calibration sequences of one forward", low=1)
    grad_accum: int = option(1, "forwards of one optimiser step", low=1)
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises", low=0.0, below=1.0)

    stage: ClassVar[str] = "recover"

    @property
    def wants_inputs(self) -> bool:
        return self.training_mode == "reconstruct"

    def check(self, layers: Sequence[Layer]) -> None:
        if not (self.train_bias or self.train_norm or self.train_lora or self.train_head_lora):
            raise UserError("method.perp.train_lora=false: with train_bias and train_norm off too, nothing is trained")
        if self.train_head_lora and self.training_mode == "reconstruct":
            raise UserError("method.perp.train_head_lora=true: no block holds the head; needs training_mode=retrain")

    def check_model(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        if self.train_head_lora:
            head = _head(model)
            if head is None:
                raise UserError(f"method.perp.train_head_lora=true: {type(model).__name__} has no linear output head")
            if head.weight is _embedding(model):
                raise UserError("method.perp.train_head_lora=true: this model ties its head to its embedding")
        if not self.parameters(model, layers):
            key, what = ("train_norm", "norms") if self.train_norm else ("train_bias", "biases")
            raise UserError(
                f"method.perp.{key}=true: {type(model).__name__} has no {what} in scope, and nothing else is trained; "
                "turn on train_lora"
            )

    def touches(self, model: nn.Module, layers: Sequence[Layer]) -> set[str]:
        return set(self.parameters(model, layers))

    def remarks(self, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
        found = []
        if not _pruned(layers):
            found.append("perp: nothing was pruned, so there is nothing to recover")
        elif not self.parameters(model, layers):
            found.append("perp: nothing that was pruned is in its scope")
        if self.train_bias and not any(name.endswith("bias") for name, _ in model.named_parameters()):
            found.append("perp: train_bias trains nothing, the model has no biases")
        return found

    def parameters(self, model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
        """Names of what the method trains in the whole model, with the number of trained parameters."""
        if self.training_mode == "retrain":
            roots: list[tuple[str, nn.Module]] = [("", model)]
        else:
            prefix, blocks = decoder_blocks(model)
            roots = [(f"{prefix}.{index}.", block) for index, block in enumerate(blocks)]
        found = {}
        for prefix, root in roots:
            for name, layer in self._subset(root, prefix, layers):
                tensor = root.get_parameter(name)
                found[prefix + name] = tensor.numel() if layer is None else self.rank * sum(tensor.shape)
        return found

    def _subset(self, root: nn.Module, prefix: str, layers: Iterable[Layer]) -> Iterator[tuple[str, Layer | None]]:
        """What is trained under ``root``, whose full name is ``prefix``: parameter names within it, with
        the layer where the update is of low rank."""
        pruned = {id(layer.module): layer for layer in layers}
        head = _head(root) if self.train_head_lora else None
        for name, module in root.named_modules():
            if module is head:
                yield f"{name}.weight", Layer(name, head)
            if not self.in_scope(prefix + name):
                continue
            norm = self.train_norm and "norm" in type(module).__name__.lower()
            for kind, _ in module.named_parameters(recurse=False):
                if norm or (self.train_bias and kind.endswith("bias")):
                    yield f"{name}.{kind}".lstrip("."), None
            if self.train_lora and id(module) in pruned:
                yield f"{name}.weight", pruned[id(module)]

    def adapters(self, root: nn.Module, prefix: str, layers: Iterable[Layer], seed: int = 0) -> dict[str, Adapter]:
        """Fresh adapters by the name of the parameter under ``root`` that each stands in for."""
        made: dict[str, Adapter] = {}
        for name, layer in self._subset(root, prefix, layers):
            if layer is None:
                made[name] = Own(root.get_parameter(name))
            elif layer.mask is not None:
                kind = LORA_TYPES[self.lora_type]
                made[name] = kind(layer.weight, layer.mask, self.rank, self.alpha, layer.generator)
            else:  # the head, which is dense
                generator = torch.Generator().manual_seed(seed)
                made[name] = LoRA(layer.weight, torch.ones((), dtype=torch.bool), self.rank, self.alpha, generator)
        return made

    def observe(self, run: BlockRun) -> list[Tensor] | None:
        return run() if self.training_mode == "reconstruct" else None

    def recover(
        self, block: nn.Module, layers: Sequence[Layer], seen: list[Tensor] | None, run: BlockRun
    ) -> Mapping[str, float] | None:
        if seen is None or not _pruned(layers):
            return None
        inside = {id(module): name for name, module in block.named_modules()}
        prefix = layers[0].name.removesuffix(inside[id(layers[0].module)])
        adapters = self.adapters(block, prefix, layers)
        if not adapters:
            return None
        started = time.perf_counter()
        before = _mean_square(run(), seen)
        with adapting(block, adapters) as adapted:
            self._reconstruct(adapted, seen, run)
            adapted.merge()
        return {
            "recovery_steps": self.n_iterations,
            "reconstruction_mse_before": before,
            "reconstruction_mse_after": _mean_square(run(), seen),
            "seconds_recover": time.perf_counter() - started,
        }

    def _reconstruct(self, adapted: Adapted, targets: list[Tensor], run: BlockRun) -> None:
        """Trains the block's adapters on mini-batches in fixed order, again from the first when all were seen."""
        optimiser = torch.optim.AdamW(adapted.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate_at)
        size, rows = self.batch_size, run.rows
        batches = [range(first, min(first + size, rows)) for first in range(0, rows, size)]
        for step in range(self.n_iterations):
            for part in range(self.grad_accum):
                batch = batches[(step * self.grad_accum + part) % len(batches)]
                loss = F.mse_loss(run.batch(batch, adapted).float(), take_rows(targets, batch).float())
                (loss / self.grad_accum).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()

    def rate_at(self, step: int) -> float:
        """Reconstruction's factor on the learning rate: rises over int(warmup_ratio * n) steps, then falls to 0."""
        warmup = int(self.warmup_ratio * self.n_iterations)
        return step / warmup if step < warmup else (self.n_iterations - step) / (self.n_iterations - warmup)

    def finish(self, layers: Sequence[Layer], around: Surroundings) -> dict[str, Any]:
        model = around.loaded.model
        sizes = self.parameters(model, layers)
        if not _pruned(layers) or not sizes:
            return {"trainable_fraction": 0.0, "recovery_steps": 0}
        own = {name for name, layer in self._subset(model, "", layers) if layer is None}
        total = sum(one.numel() for one in model.parameters())
        total += sum(size for name, size in sizes.items() if name not in own)  # adapters are parameters too
        notes: dict[str, Any] = {"trainable_fraction": sum(sizes.values()) / total}
        if self.training_mode == "retrain":
            started = time.perf_counter()
            losses = self._retrain(layers, around)
            tenth = max(1, len(losses) // 10)
            notes |= {
                "recovery_steps": len(losses),
                "recovery_loss_first": sum(losses[:tenth]) / tenth,
                "recovery_loss_last": sum(losses[-tenth:]) / tenth,
                "seconds_recover": time.perf_counter() - started,
            }
        return notes

    def rewrote(self, notes: Mapping[str, Any]) -> bool:
        return bool(notes.get("recovery_steps"))

    def _retrain(self, layers: Sequence[Layer], around: Surroundings) -> list[float]:
        """Trains the whole model's adapters on the calibration sequences; the loss of every step."""
        model, adapters = around.loaded.model, self.adapters(around.loaded.model, "", layers, around.seed)
        losses = finetune(
            adapters, around, around.calibration(), steps=self.n_iterations, lr=self.lr, batch_size=self.batch_size,
            grad_accum=self.grad_accum, warmup=self.warmup_ratio,
        )  # fmt: skip
        Adapted(model, adapters).merge()
        return losses


def finetune(
    adapters: Mapping[str, Adapter],
    around: Surroundings,
    windows: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    grad_accum: int,
    warmup: float,
) -> list[float]:
    """Trains the adapters of the model on sequences (sequences, tokens) with AdamW, the rate rising over the share
    ``warmup`` of the steps and falling to 0; the loss of every step. The model itself stays as it is."""
    model, length = around.loaded.model, windows.shape[1] - 1
    config = TrainConfig(
        steps=steps,
        batch_tokens=batch_size * grad_accum * length,
        lengths=((1.0, length),),
        weight_decay=0.0,
        warmup=warmup,
        decay=1 - warmup,
        seed=around.seed,
    )
    # one source for each forward of a step: the trainer adds up their gradients
    source = Windows(windows)
    sources = {f"part{index}": (source, 1 / grad_accum) for index in range(grad_accum)}
    watch = Watch(around)
    devices = [one for one in {p.device for p in model.parameters()} if one.type != "cpu"]
    with torch.random.fork_rng(devices), adapting(model, adapters) as adapted:
        torch.manual_seed(around.seed)  # for models with dropout
        optimiser = torch.optim.AdamW(adapted.parameters(), lr=lr, weight_decay=0.0)
        Trainer(adapted, sources, config, None, [watch], optimisers=[optimiser]).fit()
    return watch.losses


@dataclass
class Windows:
    """Calibration sequences (sequences, tokens) as a source: the rows of one step are all different, so that there are
    no more of them than sequences."""

    windows: Tensor

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        ids = self.windows[rng.sample(range(len(self.windows)), len(self.windows))[:rows]]
        return Batch(ids, torch.ones(len(ids), length))


@dataclass
class Watch(Hook):
    """Keeps the loss of every step and shows progress."""

    around: Surroundings
    losses: list[float] = field(default_factory=list)

    def after_step(self, trainer: Trainer) -> None:
        self.losses.append(sum(trainer.losses.values()) / len(trainer.losses))
        self.around.progress(len(self.losses), trainer.config.steps)


def _pruned(layers: Iterable[Layer]) -> bool:
    return any(layer.mask is not None and not bool(layer.mask.all()) for layer in layers)


def _mean_square(outputs: list[Tensor], targets: list[Tensor]) -> float:
    """The mean squared difference over all elements of two lists of groups of rows."""
    total = sum(float((one.float() - two.float()).square().sum()) for one, two in zip(outputs, targets, strict=True))
    return total / sum(one.numel() for one in targets)


def _head(model: nn.Module) -> nn.Linear | None:
    """The output head of a Hugging Face causal model, or None."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Linear) else None


def _embedding(model: nn.Module) -> nn.Parameter | None:
    """The weight of the input embedding, or None."""
    find = getattr(model, "get_input_embeddings", None)
    return getattr(find(), "weight", None) if find is not None else None
