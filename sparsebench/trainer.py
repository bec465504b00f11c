"""The one training loop: sources of weighted tokens, a schedule, checkpoints, resume, and hooks.

Methods that train (sparse training, recovery, distillation) plug in through ``Hook``; they never
write a loop of their own. A step's data depends on (seed, step) alone, so a run that was stopped
and resumed from a checkpoint sees what it would have seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Batch:
    """``ids``: (rows, length + 1) int64; ``weights``: (rows, length) float32, one per predicted token."""

    ids: Tensor
    weights: Tensor


class Source(Protocol):
    """Where training tokens come from."""

    def batch(self, rng: Random, rows: int, length: int) -> Batch: ...


class Hook:
    """What a training-phase method may do at each point of a step. Every method is optional."""

    def on_init(self, trainer: Trainer) -> None:
        """Before the first step (after a checkpoint was loaded)."""

    def before_forward(self, trainer: Trainer, batches: Mapping[str, Batch]) -> None:
        """With the step's data, before the model runs."""

    def loss(self, trainer: Trainer, batch: Batch, logits: Tensor) -> Tensor | None:
        """An extra loss added to the weighted cross entropy; logits: (rows, length, vocabulary)."""

    def after_backward(self, trainer: Trainer) -> None:
        """Gradients are there and clipped, the optimiser has not stepped."""

    def after_step(self, trainer: Trainer) -> None:
        """The optimiser has stepped."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step."""


@dataclass(frozen=True)
class TrainConfig:
    """Units: ``batch_tokens`` per step over all sources; ``lengths``: (share of the steps, tokens)
    in order; ``warmup`` and ``decay`` are shares of ``steps`` (constant between them, then linear
    to zero). ``muon_lr`` > 0 trains the blocks' matrices with Muon, 0 trains all with AdamW.
    ``autocast`` runs the forward in bfloat16 (weights, gradients and losses stay float32)."""

    steps: int
    batch_tokens: int = 8192
    lengths: tuple[tuple[float, int], ...] = ((1.0, 256),)
    lr: float = 3e-3
    muon_lr: float = 0.0
    weight_decay: float = 0.1
    warmup: float = 0.02
    decay: float = 0.4
    clip: float = 1.0
    autocast: bool = False
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 200

    def length_at(self, step: int) -> int:
        share = step / self.steps
        for until, length in self.lengths:
            if share < until:
                return length
        return self.lengths[-1][1]

    def rate_at(self, step: int) -> float:
        """The factor on every learning rate at this step."""
        warmup, decay = self.warmup * self.steps, self.decay * self.steps
        return min(1.0, (step + 1) / max(warmup, 1.0), (self.steps - step) / max(decay, 1.0))


@dataclass
class Trainer:
    """``sources`` maps a name to (source, share of the batch and of the loss); shares sum to 1.

    Without a ``folder`` nothing is written and nothing can be resumed. ``optimisers`` replaces those
    that ``config`` describes; the schedule scales their learning rates."""

    model: nn.Module
    sources: Mapping[str, tuple[Source, float]]
    config: TrainConfig
    folder: Path | None
    hooks: Sequence[Hook] = ()
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    step: int = 0
    tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    optimisers: list[torch.optim.Optimizer] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.optimisers = self.optimisers or _optimisers(self.model, self.config)
        self._base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimisers]

    def fit(self) -> nn.Module:
        """Trains to the end (from the last checkpoint if there is one) and returns the model."""
        self._resume()
        self._call("on_init")
        self.model.train()
        since, tokens_then = time.monotonic(), self.tokens
        while self.step < self.config.steps:
            self._one_step()
            self.step += 1
            last = self.step == self.config.steps
            entry: dict[str, Any] = {}
            if self.step % self.config.log_every == 0 or last:
                rate = (self.tokens - tokens_then) / (time.monotonic() - since)
                since, tokens_then = time.monotonic(), self.tokens
                entry = {"tokens_per_s": round(rate), **{f"loss/{k}": round(v, 4) for k, v in self.losses.items()}}
            if self.evaluate and (self.step % self.config.evaluate_every == 0 or last):
                self.model.eval()
                entry |= self.evaluate(self.model)
                self.model.train()
            if entry:
                self._log(entry)
            if self.step % self.config.checkpoint_every == 0 or last:
                self._save()
        self.model.eval()
        self._call("on_end")
        return self.model

    def _one_step(self) -> None:
        config, length = self.config, self.config.length_at(self.step)
        batches = self._batches(length)
        for optimiser, rates in zip(self.optimisers, self._base_rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * config.rate_at(self.step)
        self._call("before_forward", batches)
        for name, batch in batches.items():
            with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=config.autocast):
                logits = self.model(input_ids=batch.ids[:, :-1], use_cache=False).logits
            nll = F.cross_entropy(logits.flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
            weights = batch.weights.flatten()
            loss = (nll * weights).sum() / weights.sum()
            self.losses[name] = float(loss.detach())
            extra = [hook.loss(self, batch, logits) for hook in self.hooks]
            total = sum((term for term in extra if term is not None), loss)
            (total * self.sources[name][1]).backward()
            self.tokens += batch.weights.numel()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self._call("after_backward")
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._call("after_step")

    def _batches(self, length: int) -> dict[str, Batch]:
        """The step's data by source, where the model is."""
        rng = Random(f"train/{self.config.seed}/{self.step}")
        device = next(self.model.parameters()).device
        batches = {}
        for name, (source, share) in self.sources.items():
            batch = source.batch(rng, max(1, round(share * self.config.batch_tokens / length)), length)
            batches[name] = Batch(batch.ids.to(device), batch.weights.to(device))
        return batches

    def _call(self, point: str, *arguments: object) -> None:
        for hook in self.hooks:
            getattr(hook, point)(self, *arguments)

    def _log(self, entry: dict[str, Any]) -> None:
        if self.folder is None:
            return
        line = {"step": self.step, "tokens": self.tokens, "length": self.config.length_at(self.step - 1), **entry}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "config": json.dumps(asdict(self.config)),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        if self.folder is None:
            return
        log, checkpoint = self.folder / "log.jsonl", self.folder / "checkpoint.pt"
        if not checkpoint.exists():
            self._forget_log(log)
            return
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # loading moves it
        if state["config"] != json.dumps(asdict(self.config)):
            raise ValueError(f"{checkpoint} was made with other training settings; name another folder or remove it")
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]
        self._forget_log(log)

    def _forget_log(self, path: Path) -> None:
        """Drops what was logged after the checkpoint (a torn last line too): those steps come again."""
        if not path.exists():
            return
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= self.step))


def _optimisers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    if config.muon_lr == 0:
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
