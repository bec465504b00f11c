"""What a weight method is: the contract of the family, and the bases on which a method is a few lines.

``walk`` applies a stack of them; a method says only what it scores, masks, refines or repairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights import allocation, masks
from sparsebench.methods.weights.statistics import Several, Statistic
from sparsebench.models.blocks import BlockInputs


@dataclass
class Layer:
    """A linear layer in scope: its full name, module, the statistic that the method at work asked for
    (None without data; ``gathered`` holds those of the whole stack), and the run's random generator
    seeded for it.

    Once it is pruned, ``mask`` (out, in) bool says what was kept, and while a method of stage refine
    is in the stack, ``dense`` holds the weight as it was, ``n_of_m`` the selector's pattern and ``score``
    (out, in) its saliency, if it has one. ``level`` is the sparsity that was allocated
    to it (None before ``prepare``), ``surplus`` the zeros that a method's data made it add to its count,
    ``warnings`` what the record should say (layers with the same text are reported together)."""

    name: str
    module: nn.Linear
    statistic: Any = None
    gathered: Several | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    mask: Tensor | None = None
    dense: Tensor | None = None
    level: float | None = None
    surplus: int = 0
    warnings: list[str] = field(default_factory=list)
    score: Tensor | None = None
    n_of_m: tuple[int, int] | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in), as stored."""
        return self.module.weight.data


@dataclass(frozen=True)
class BlockRun:
    """Runs the calibration data through a block as it is now; without data there is none to run."""

    block: nn.Module
    index: int
    inputs: BlockInputs | None

    def __call__(self) -> list[Tensor]:
        """The outputs for all rows, in the walk's groups: each (rows, tokens, hidden size)."""
        return [] if self.inputs is None else self.inputs.run(self.index, self.block)

    @property
    def rows(self) -> int:
        """Sequences of calibration data."""
        return 0 if self.inputs is None else sum(len(group) for group in self.inputs.hidden)

    def batch(self, rows: range, block: nn.Module) -> Tensor:
        """What ``block``, called in this block's place, puts out for consecutive rows, with gradients
        where they are on: (rows, tokens, hidden size)."""
        if self.inputs is None:
            raise ValueError("no calibration data was asked for (wants_inputs)")
        return self.inputs.run_rows(self.index, block, rows)


@dataclass(frozen=True)
class WeightMethod(Declared):
    """Base of weight methods. A subclass overrides what its stage does."""

    include: tuple[str, ...] = option((), "only layers whose name fits one of these patterns, such as *q_proj")
    exclude: tuple[str, ...] = option((), "not the layers whose name fits one of these patterns")

    stage: ClassVar[str] = "select"
    also_recovers: ClassVar[bool] = False  # whether a method of stage select repairs what it pruned, too
    stores_zeros: ClassVar[bool] = False  # whether zeros among the kept are stored (as codes), so do not count

    def statistic(self) -> Callable[[], Statistic] | None:
        """What to gather of each layer's inputs, or None where no data is needed."""
        return None

    @property
    def order(self) -> str:
        """What the statistics see: ``block`` (earlier blocks pruned, this one dense), ``layer`` (earlier
        layers of the block pruned too) or ``none`` (the dense model everywhere)."""
        return "block"

    @property
    def blockwise(self) -> bool:
        """Whether the method ever needs but one block at a time; others cannot prune a model that is streamed."""
        repairs = self.stage == "recover" or self.also_recovers
        return not repairs and type(self).select_all is WeightMethod.select_all

    def in_scope(self, name: str) -> bool:
        included = not self.include or any(fnmatch(name, pattern) for pattern in self.include)
        return included and not any(fnmatch(name, pattern) for pattern in self.exclude)

    def check(self, layers: Sequence[Layer]) -> None:
        """UserError when an option does not fit these layers; runs before anything is recorded."""

    def check_model(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """UserError when an option does not fit the model around the layers; runs after ``check``."""

    def check_beside(self, others: Sequence[str]) -> None:
        """UserError when the method does not go with these others of its stack."""

    def prepare(self, layers: Sequence[Layer]) -> None:
        """Sees all layers before the first is pruned (global rankings, allocations)."""

    def select_all(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Order ``none``: masks by layer name that only all layers together give, in place of ``solve``."""
        return {}

    def select(self, layer: Layer) -> Tensor:
        """The layer's mask: (out, in) bool, True = kept."""
        return torch.ones_like(layer.weight, dtype=torch.bool)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n kept, m) of what the method selects, or None when unstructured."""
        return None

    def score(self, layer: Layer) -> Tensor | None:
        """Stage select: the saliency of the dense weights, (out, in) float32, for methods that refine the
        mask; None where the method has none."""
        return None

    def solve(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The layer's mask and its weight (out, in); methods that update what they keep override this."""
        return self.select(layer), layer.weight

    def solve_together(self, layers: Sequence[Layer]) -> list[tuple[Tensor, Tensor]]:
        """``solve`` for layers with the same inputs and one statistic (q, k and v; gate and up); methods that save by
        doing them at once override this. Never changes ``layer.weight``."""
        return [self.solve(layer) for layer in layers]

    def refine(self, layer: Layer, mask: Tensor) -> Tensor:
        """Stage refine: another mask for the layer; kept entries have their dense values (``layer.dense``)."""
        return mask

    def observe(self, run: BlockRun) -> Any:
        """Stage recover: what to remember of a block before it is pruned; ``run()`` gives its dense outputs."""
        return None

    def recover(
        self, block: nn.Module, layers: Sequence[Layer], seen: Any, run: BlockRun
    ) -> Mapping[str, float] | None:
        """Stage recover: repairs the pruned block; ``seen`` is what ``observe`` returned. Pruned entries
        stay zero (``layer.mask``). Returns extra columns for the record, summed over the blocks."""
        return None

    def finish(self, layers: Sequence[Layer], around: Surroundings) -> dict[str, Any]:
        """Stage recover: repairs the whole model after the walk; returns extra columns for the record."""
        return {}

    def rewrote(self, notes: Mapping[str, Any]) -> bool:
        """Whether weights that stay may have changed although nothing was removed, from what the methods noted."""
        return False

    def remarks(self, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
        """What the record should warn of once the stack has run, beside the layers' own warnings."""
        return []

    @property
    def wants_inputs(self) -> bool:
        """Whether calibration data must run through the blocks although no statistic is asked for."""
        return False

    def touches(self, model: nn.Module, layers: Sequence[Layer]) -> set[str]:
        """Names of the parameters that the method may change."""
        return {f"{layer.name}.weight" for layer in layers}

    def asked(self, layer: Layer) -> float | None:
        """The sparsity asked of a layer; None where nothing was."""
        return None

    def tolerance(self, layers: Sequence[Layer]) -> float:
        """How far the achieved sparsity may be from the asked one by the method's own rounding; seen after
        the last layer is pruned."""
        return 1e-9


@dataclass(frozen=True)
class Pruner(WeightMethod):
    """Base of methods that are asked for a level: ``sparsity``, or an n:m ``pattern``."""

    sparsity: float | None = option(
        None, "zeros / all over the method's scope; the run's sparsity if not given", low=0.0, below=1.0
    )
    pattern: str | None = option(None, "unstructured or n:m with n kept; the run's pattern if not given")
    remainder: str = option(
        "refuse",
        "columns behind the last whole n:m group: refuse the layer, or leave them dense",
        choices=("refuse", "dense"),
    )
    allocation: str = option(
        "uniform",
        "level of each layer: the same, by Erdos-Renyi (er, erk: small layers keep more), or from a table",
        choices=("uniform", "er", "erk", "table"),
    )
    table: str | None = option(
        None,
        "a YAML or JSON file that maps patterns of layer names to sparsities; "
        "layers that no pattern fits share the rest of the total",
        unit="file",
        only="allocation=table",
    )

    @property
    def level(self) -> float:
        """The sparsity to reach in total: what n:m implies, what was asked, or a half."""
        if self.n_of_m:
            return 1 - self.n_of_m[0] / self.n_of_m[1]
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n kept, m), or None when unstructured."""
        if self.pattern in (None, "unstructured"):
            return None
        kept, group = str(self.pattern).split(":")
        return int(kept), int(group)

    @property
    def rule(self) -> str:
        """The allocation at work; methods that imply one override this."""
        return self.allocation

    def levels(self, layers: Sequence[Layer]) -> dict[str, float]:
        """The sparsity of every layer, by name; over all of them it is ``level``."""
        shapes = {layer.name: tuple(layer.weight.shape) for layer in layers}
        return allocation.levels(self.rule, shapes, self.level, self.table)

    def level_of(self, layer: Layer) -> float:
        """The sparsity to reach in this layer."""
        return self.level if layer.level is None else layer.level

    def prepare(self, layers: Sequence[Layer]) -> None:
        levels = self.levels(layers)
        for layer in layers:
            layer.level = levels[layer.name]

    def check(self, layers: Sequence[Layer]) -> None:
        if self.n_of_m and self.rule != "uniform":
            raise UserError(f"allocation={self.rule}: pattern={self.pattern} gives every layer the same level")
        if self.table is not None and self.rule != "table":
            raise UserError(f"table={self.table}: goes with allocation=table, not {self.rule}")
        self.levels(layers)
        if self.n_of_m is None or self.remainder == "dense":
            return
        for layer in layers:
            if layer.weight.shape[1] % self.n_of_m[1]:
                raise UserError(
                    f"pattern={self.pattern}: {self.n_of_m[1]} does not divide the {layer.weight.shape[1]} inputs of "
                    f"{layer.name}; exclude it, or leave the rest dense with remainder=dense"
                )

    def asked(self, layer: Layer) -> float | None:
        return self.level_of(layer)

    def tolerance(self, layers: Sequence[Layer]) -> float:
        if self.n_of_m is None:
            return super().tolerance(layers)
        # columns behind the last whole group stay
        columns = [layer.weight.shape[1] for layer in layers]
        return 1e-9 + max(self.level * (count % self.n_of_m[1]) / count for count in columns)


@dataclass(frozen=True)
class ScorePruner(Pruner):
    """Base of methods that score every weight and prune the smallest of each comparison group."""

    group: str = option("layer", "weights that are compared with each other", choices=("row", "layer", "global"))

    def score(self, layer: Layer) -> Tensor:
        """The saliency of every weight: (out, in) float32."""
        raise UserError(f"{type(self).__name__} declares no score")

    def keep_layer(self, scores: Tensor, level: float) -> Tensor:
        """The mask of one matrix under ``group=layer``."""
        return masks.keep_count(scores, int(scores.numel() * level))

    @property
    def order(self) -> str:
        return "none" if self.group == "global" else "block"

    @property
    def blockwise(self) -> bool:
        return self.group != "global"

    def check(self, layers: Sequence[Layer]) -> None:
        super().check(layers)
        if self.n_of_m and self.group == "global":
            raise UserError(f"group=global ranks single weights; it does not go with pattern={self.pattern}")
        if self.rule != "uniform" and self.group == "global":
            raise UserError(f"allocation={self.rule}: group=global finds the level of each layer itself")

    def select(self, layer: Layer) -> Tensor:
        scores = self.score(layer)
        if self.n_of_m:
            return masks.keep_n_of_m(scores, *self.n_of_m)
        level = self.level_of(layer)
        return masks.keep_rows(scores, level) if self.group == "row" else self.keep_layer(scores, level)

    def select_all(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        if self.group != "global":
            return {}
        return masks.keep_global({layer.name: self.score(layer) for layer in layers}, self.level)

    def tolerance(self, layers: Sequence[Layer]) -> float:
        if self.n_of_m:
            return super().tolerance(layers)
        if self.group == "row":
            return max(1 / layer.weight.shape[1] for layer in layers)
        return max(2 / layer.weight.numel() for layer in layers)
