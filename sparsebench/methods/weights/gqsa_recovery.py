"""The two stages that recover a group-quantised model: blocks on their dense outputs, then grids on the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.adapters import adapting
from sparsebench.methods.weights.base import BlockRun
from sparsebench.methods.weights.gqsa_groups import Grouped
from sparsebench.methods.weights.perp import Watch
from sparsebench.models.blocks import take_rows
from sparsebench.trainer import Batch, TrainConfig, Trainer

FINAL = 0.05  # of the learning rate, where the blocks' cosine schedule ends


@dataclass(frozen=True)
class BlockStage:
    """Block-wise optimisation: passes over the first ``nsamples`` sequences in batches; learning rates of the kept
    weights and of scale and zero."""

    epochs: int
    lr_w: float
    lr_q: float
    batch: int
    nsamples: int

    def train(
        self, adapters: Mapping[str, Grouped], run: BlockRun, targets: list[Tensor], generator: torch.Generator
    ) -> dict[str, float]:
        """Minimises mean (block(X) - Y)^2 by AdamW without decay, X and its rows those of ``run``, Y ``targets``
        (groups of rows); the batches of a pass come in an order that ``generator`` draws."""
        rows = min(run.rows, self.nsamples)
        batches = [range(first, min(first + self.batch, rows)) for first in range(0, rows, self.batch)]
        with adapting(run.block, adapters) as adapted:

            def loss(batch: range) -> Tensor:
                return F.mse_loss(run.batch(batch, adapted).float(), take_rows(targets, batch).float())

            before = _mean(loss, batches)
            grids = [one for adapter in adapters.values() for one in (adapter.scale, adapter.zero)]
            weights = [adapter.values for adapter in adapters.values() if adapter.values is not None]
            optimiser = torch.optim.AdamW(
                [{"params": weights, "lr": self.lr_w}, {"params": grids, "lr": self.lr_q}], weight_decay=0.0
            )
            steps = self.epochs * len(batches)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step / steps))
            for _ in range(self.epochs):
                for index in torch.randperm(len(batches), generator=generator).tolist():
                    loss(batches[index]).backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
            after = _mean(loss, batches)
        return {"recovery_steps": steps, "reconstruction_mse_before": before, "reconstruction_mse_after": after}


@torch.no_grad()
def _mean(loss: Callable[[range], Tensor], batches: list[range]) -> float:
    """The mean over all rows."""
    return sum(float(loss(batch)) * len(batch) for batch in batches) / sum(map(len, batches))


def _cosine(share: float) -> float:
    """Falls from 1 to ``FINAL``."""
    return FINAL + (1 - FINAL) * (1 + float(torch.cos(torch.tensor(share * torch.pi)))) / 2


@dataclass
class Passes:
    """Sequences (sequences, tokens) as a source that gives each once per pass, in an order drawn for the pass."""

    windows: Tensor
    seed: int
    taken: int = 0

    def batch(self, rng: Random, rows: int, length: int) -> Batch:
        """The next ``rows`` sequences; the last of a pass may be fewer."""
        number, first = divmod(self.taken, len(self.windows))
        order = list(range(len(self.windows)))
        Random(f"pass/{self.seed}/{number}").shuffle(order)
        chosen = order[first : first + rows]
        self.taken += len(chosen)
        return Batch(self.windows[chosen], torch.ones(len(chosen), length))


def train_grids(
    adapters: Mapping[str, Grouped], around: Surroundings, epochs: int, lr: float, batch: int
) -> list[float]:
    """End-to-end tuning: the language-model loss over the whole model by scale and zero of its frozen codes, AdamW
    without decay, the learning rate falling linearly to zero. ``adapters``: by the name of the weight in the model.
    Returns the loss of every step."""
    model: nn.Module = around.loaded.model
    windows = around.calibration()
    length = windows.shape[1] - 1
    config = TrainConfig(
        steps=epochs * -(-len(windows) // batch),
        batch_tokens=batch * length,
        lengths=((1.0, length),),
        warmup=0.0,
        decay=1.0,
        seed=around.seed,
    )
    watch = Watch(around)
    devices = [one for one in {p.device for p in model.parameters()} if one.type != "cpu"]
    with torch.random.fork_rng(devices), adapting(model, adapters) as adapted:
        torch.manual_seed(around.seed)  # for models with dropout
        optimiser = torch.optim.AdamW(adapted.parameters(), lr=lr, weight_decay=0.0)
        source = Passes(windows, around.seed)
        Trainer(adapted, {"calibration": (source, 1.0)}, config, None, [watch], optimisers=[optimiser]).fit()
    return watch.losses
