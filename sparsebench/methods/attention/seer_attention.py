"""SeerAttention (Gao et al. 2024, arXiv 2410.13276): a learned gate says which blocks of a prompt are computed.

A gate per layer (``gates.py``) maps pooled queries and keys to block scores. It alone is trained, by distillation from
the model's own attention, max-pooled to blocks: Kullback-Leibler divergence times 10, the first quarter of block rows
left out, AdamW at 1e-3 without decay. The model's weights stay bit for bit as they were.

Blocks are taken by a ``threshold`` on softmaxed scores (the last two block rows are then dense) or by ``nz_ratio``, a
share of the triangle by the best logits of each row. ``sparsity`` searches the latter. Achieved counts causal pairs,
``sparsity_reported`` blocks of the lower triangle. A row without any block gives zeros, unless ``force_diagonal``.

Paper: 500 steps of 16 sequences of 65536 tokens, cosine schedule, blocks of 64, gate width 128. Here the defaults suit
short prompts and small models: 200 steps of 4 sequences, blocks of at most a 64th of the prompt; the schedule decays
linearly. A gate is trained for one block size: ``block_size`` for the calibration's length holds for all prompts. The
form for decoding (SeerAttention-R) is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isclose
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention, attention_of
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.attention.base import block_of, extents, heads_of
from sparsebench.methods.attention.fitted import FittedMethod
from sparsebench.methods.attention.gates import (
    block_rotary,
    by_share,
    by_threshold,
    distance,
    gate_logits,
    pooled_attention,
    pools_of,
)
from sparsebench.methods.attention.selections import Heads, Selection, block_sparsity, blocks
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.perp import Windows
from sparsebench.models.plug import Allowed, Call, Handler, check_rotary, plugged, positions_of, reach, rotates
from sparsebench.trainer import Batch, Hook, TrainConfig, Trainer


@method(
    name="seer_attention",
    version=1,
    paper="Gao et al. 2024, arXiv 2410.13276",
    target="attention",
    phase="prefill",
    uses=("calibration", "seed"),
    baseline="block_sparse",
    taxonomy=Taxonomy(
        object="attention",
        granularity=("block",),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        allocation="learned",
        benefit_realised_on=("flops",),
        kernel_required="block lists",
        training_cost_claim="more",
    ),
)
@dataclass(frozen=True)
class SeerAttention(FittedMethod):
    """Computes the blocks that a small trained gate scores highest."""

    threshold: float | None = option(
        None, "softmaxed gate score of a block, in place of sparsity", low=0.0, below=1.0, unit="instead of sparsity"
    )
    nz_ratio: float | None = option(
        None, "share of blocks by best logits, in place of sparsity", above=0.0, high=1.0, unit="instead of sparsity"
    )
    gate_type: str = option("Qavg_Kmaxminavg", "poolings (max, min, avg) of queries and keys, in order")
    block_size: int | None = option(None, "tokens of a block; 64, or less for short calibration sequences", low=1)
    gate_hidden_size: int | None = option(None, "width of the gate; the head size, at most 128", low=2)
    force_double: bool = option(False, "queries have a matrix even where the gate is as wide as a head")
    last_block_dense: bool = option(True, "the last two rows of blocks are dense", only="threshold")
    force_diagonal: bool = option(False, "always compute a query block's own keys")
    steps: int = option(200, "training steps of the gate", low=1, only="fitted_from=none")
    batch: int = option(4, "sequences per training step", low=1, only="fitted_from=none")
    lr: float = option(1e-3, "learning rate", above=0.0, only="fitted_from=none")
    gate_loss_scale: float = option(10.0, "factor on the loss", above=0.0, only="fitted_from=none")
    drop_first_fraction: float = option(0.25, "share of block rows, from the first on, that are not learned from",
                                        low=0.0, below=1.0, only="fitted_from=none")  # fmt: skip

    knobs: ClassVar[tuple[str, ...]] = ("threshold", "nz_ratio")
    sizes: ClassVar[tuple[str, ...]] = ("block_size",)

    def check_model(self, model: PreTrainedModel) -> None:
        if self.threshold is not None and self.nz_ratio is not None:
            raise UserError(f"{self.name('nz_ratio')}: give threshold or nz_ratio, not both")
        try:
            pools_of(self.gate_type)
        except ValueError:
            raise UserError(f"{self.name('gate_type')}: must be Q and K with max, min, avg: Qavg_Kmaxminavg") from None
        if self.gate_hidden_size is not None and self.gate_hidden_size % 2:
            raise UserError(f"{self.name('gate_hidden_size')}: must be even, halves are rotated")
        turning = [module for module in reach(model) if rotates(module)]
        for module in turning:
            check_rotary(module)
        if turning and _base(model) is None:
            raise UserError(f"model: the config of {type(model).__name__} does not name its rotary base (rope_theta)")
        super().check_model(model)

    def leaves_out(self, tokens: int) -> bool:
        if self.block_size is None:
            return True
        dense_rows = self.threshold is not None and self.last_block_dense
        return -(-tokens // self.block_size) > (3 if dense_rows else 1)  # the first row is one block, which is taken

    def shapes(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        layers = attention_of(model)
        heads, kv, width = layers[0].heads, layers[0].kv_heads, layers[0].head_dim
        gate = self.gate_hidden_size or min(128, width)
        query, key = (len(kinds) * width for kinds in pools_of(self.gate_type))
        plain = query == width == gate and not self.force_double
        found: dict[str, tuple[int, ...]] = {"block_size": (), "rope_base": ()}
        for index in range(len(layers)):
            found[f"gates.{index}.k"] = (heads if plain else kv, key, gate)
            if not plain:
                found[f"gates.{index}.q"] = (heads, query, gate)
        return found

    def fault(self, learned: Mapping[str, Tensor], model: PreTrainedModel) -> str | None:
        size, base, own = float(learned["block_size"]), float(learned["rope_base"]), _base(model) or 0.0
        most = positions_of(model) or inf
        if size != int(size) or not 1 <= size <= most:
            return f"block_size is {size:g}; must be a whole number >= 1 and <= {most} (the model's context)"
        if self.block_size not in (None, size):
            return f"its gate has a block_size of {size:g}, not {self.block_size}"
        if not isclose(base, own, rel_tol=1e-6):
            return f"rope_base is {base:g}; the model's is {own:g}"
        whole = [name for name, one in learned.items() if name.startswith("gates.") and not one.is_floating_point()]
        if whole:
            return f"{whole[0]} is {learned[whole[0]].dtype}, not of floating point"
        kind = learned.get("gate_type")  # older files have none
        if kind is None or kind.tolist() == _text(self.gate_type).tolist():
            return None
        said = bytes(kind.tolist()).decode(errors="replace") if kind.dtype == torch.uint8 and kind.dim() == 1 else kind
        return f"its gate has gate_type={said!r}, not {self.gate_type}"

    def learn(self, around: Surroundings) -> dict[str, Tensor]:
        windows, model = around.calibration(), around.loaded.model
        length = windows.shape[1] - 1
        size = block_of(self.block_size, 64, length + 1)
        generator = torch.Generator().manual_seed(around.seed)
        start = {
            name: _xavier(shape, generator) for name, shape in self.shapes(model).items() if name.startswith("gates.")
        }
        fixed = {
            "block_size": torch.tensor(size),
            "rope_base": torch.tensor(_base(model) or 0.0),
            "gate_type": _text(self.gate_type),
        }
        distilled = Distilled(model, start, fixed, self).to(around.loaded.device)
        config = TrainConfig(
            steps=self.steps,
            batch_tokens=self.batch * length,
            lengths=((1.0, length),),
            warmup=min(1.0, 20 / self.steps),
            decay=max(0.0, 1 - 20 / self.steps),
            seed=around.seed,
        )
        optimiser = torch.optim.AdamW(distilled.gates.parameters(), lr=self.lr, weight_decay=0.0)
        watch = _Distil(distilled, around)
        with torch.enable_grad(), distilled.frozen(), plugged(model, Teacher(distilled)):
            Trainer(distilled, {"text": (Windows(windows), 1.0)}, config, None, [watch], optimisers=[optimiser]).fit()
        losses = {"gate_losses": torch.tensor(watch.losses)}
        return {name: tensor.detach().cpu() for name, tensor in {**distilled.learned(), **fixed, **losses}.items()}

    def native(self, tokens: int) -> float | None:
        return self.nz_ratio if self.threshold is None else self.threshold

    def estimate(self, heads: Heads) -> Any:
        return self.logits(heads, heads.learned)

    def logits(self, heads: Heads, learned: Any) -> Tensor:
        """The gate's logits on one prompt: (H, n, n)."""
        weights = {
            name: learned[where].to(heads.query.device)
            for name in "qk"
            if (where := f"gates.{heads.layer}.{name}") in learned
        }
        size, base = int(learned["block_size"]), float(learned["rope_base"]) if heads.rotates else 0.0
        query, key = heads.before_rotary() if base else (heads.query, heads.key)
        count, width = -(-heads.tokens // size), weights["k"].shape[-1]
        rotary = block_rotary(count, size, width, base, query.device) if base else None
        return gate_logits(query.float(), key.float(), weights, size, self.gate_type, rotary)

    def span(self, heads: Heads, seen: Any) -> tuple[float, float]:
        return 1e-6, 1.0

    def build(self, heads: Heads, seen: Any, knob: float) -> Selection:
        if self.threshold is not None:
            mask, extra = by_threshold(seen.softmax(dim=-1), knob, self.last_block_dense), {"threshold": float(knob)}
        else:
            mask, extra = by_share(seen, knob), {"nz_ratio": float(knob)}
        if self.force_diagonal:
            mask = mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        found = blocks(mask, int(heads.learned["block_size"]), heads.tokens, reported=block_sparsity(mask))
        found.extra = extra
        return found

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        """The gate's matrices on pooled vectors, and products of all pairs of blocks."""
        count = tokens / int(learned["block_size"])
        maps = [learned[name] for name in ("gates.0.q", "gates.0.k") if name in learned]  # alike in all layers
        gate = maps[-1].shape[-1]
        return 2.0 * count * sum(one.numel() for one in maps) + 2.0 * layer.heads * gate * count**2 / 2


def _text(text: str) -> Tensor:
    """(bytes,) uint8: a text among tensors."""
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def _xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Xavier-uniform, each head's matrix for itself."""
    bound = float((6 / (shape[-1] + shape[-2])) ** 0.5)
    return (torch.rand(*shape, generator=generator) * 2 - 1) * bound


def _base(model: PreTrainedModel) -> float | None:
    """The base of the model's rotary frequencies; None for a model without."""
    config = model.config.get_text_config(decoder=True)
    found = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", getattr(config, "rope_theta", None))
    return None if found is None else float(found)


class Distilled(nn.Module):
    """A frozen model with its gates: what ``Trainer`` trains. ``terms``: the gates' losses in the last forward."""

    def __init__(
        self, base: PreTrainedModel, start: dict[str, Tensor], fixed: dict[str, Tensor], how: SeerAttention
    ) -> None:
        super().__init__()
        self.base, self.how, self.fixed = base, how, fixed
        self.gates = nn.ParameterDict({_key(name): nn.Parameter(tensor) for name, tensor in start.items()})
        self.terms: list[Tensor] = []

    def learned(self) -> dict[str, Tensor]:
        """The gates' weights by their names in a file."""
        return {name.replace("-", "."): tensor for name, tensor in self.gates.items()}

    def train(self, mode: bool = True) -> Self:
        """The frozen model is never in training mode: no dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        self.terms = []
        return self.base(input_ids=input_ids, use_cache=use_cache)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, none of the model's own parameters takes a gradient."""
        wanted = [parameter.requires_grad for parameter in self.base.parameters()]
        self.base.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, before in zip(self.base.parameters(), wanted, strict=True):
                parameter.requires_grad_(before)


def _key(name: str) -> str:
    return name.replace(".", "-")  # names of parameters have no dots


@dataclass
class Teacher(Handler):
    """Adds each layer's loss to the gates' terms; attention itself stays dense."""

    student: Distilled

    def allow(self, call: Call) -> Allowed | None:
        how, learned = self.student.how, {**self.student.learned(), **self.student.fixed}
        size = int(learned["block_size"])
        losses = []
        for row, (first, last) in enumerate(extents(call.real)):
            heads = heads_of(call, row, first, last, {})
            wanted = pooled_attention(heads, size)
            losses.append(distance(how.logits(heads, learned), wanted, how.drop_first_fraction))
        self.student.terms.append(torch.stack(losses).mean())
        return None


@dataclass
class _Distil(Hook):
    """The loss of the gates, summed over layers, and how far the training is."""

    student: Distilled
    around: Surroundings
    losses: list[float] = field(default_factory=list)

    def loss(self, trainer: Trainer, batch: Batch, logits: Tensor) -> Tensor | None:
        total = torch.stack(self.student.terms).sum() * self.student.how.gate_loss_scale
        self.losses.append(float(total.detach()))
        return total

    def after_step(self, trainer: Trainer) -> None:
        self.around.progress(trainer.step + 1, trainer.config.steps)
