"""Gates on the sites of a model, and the count of what they really skip.

A gate sees the activations of the tokens that a method acts on and keeps some of their entries; each dropped
entry spares the weights that would have multiplied it. Counts are of weights: used by acted tokens, and used in
all, per linear layer, apart for prompts and for decoded tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.costs.saving import Saving
from sparsebench.methods.activations.sites import GatedBlock, Linear
from sparsebench.methods.base import Counted
from sparsebench.models import caching

PREFILL, DECODE = 0, 1


@dataclass
class Tally:
    """Of one linear layer, by phase (prefill, decode): tokens seen, tokens acted on, weights those used.

    ``entries`` and ``kept``: activations that the gate looked at, and kept."""

    tokens: list[int] = field(default_factory=lambda: [0, 0])
    acted: list[int] = field(default_factory=lambda: [0, 0])
    used: list[int] = field(default_factory=lambda: [0, 0])
    entries: int = 0
    kept: int = 0


def top_k(score: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` largest entries of each vector: bool like ``score`` (..., features)."""
    keep = torch.zeros_like(score, dtype=torch.bool)
    return keep.scatter_(-1, score.topk(k, dim=-1).indices, True)


def only(keep: Tensor, x: Tensor) -> Tensor:
    """``x`` where it is kept, else zero (also where x is not finite)."""
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


class Gate(ABC):
    """Keeps some entries of the vectors at one place: the input of a linear layer, or the gate's activation.

    ``spares``: linear layers that need not be read where an entry is dropped, with the weights per entry: ``zeroed``,
    whose input is zero there, and those of ``unneeded``, whose output is not needed there; ``module`` and ``after``:
    whose input (or output) is gated. Without a ``kind`` it is the activation function. ``acts``: it is on the model;
    ``watched``: it may compute what only the record needs."""

    def __init__(self, block: GatedBlock, kind: str | None, *, after: bool = True) -> None:
        self.block = block
        self.after = kind is None and after
        self.acts, self.watched = False, True
        self.zeroed = block.linears[kind or "down"]
        self.unneeded = [block.linears["up"]] if kind is None else []
        self.module: nn.Module = block.activation if kind is None else self.zeroed.module
        self.needed: Tensor | None = None

    @property
    def spares(self) -> list[tuple[Linear, int]]:
        rows = [(linear, linear.module.in_features) for linear in self.unneeded]
        return [*rows, (self.zeroed, self.zeroed.module.out_features)]

    def take(self) -> Tensor | None:
        """Which outputs of the ``unneeded`` are needed for the token at hand: (neurons,) bool, None for all. Tells
        once, so that no layer goes by what another token needed."""
        needed, self.needed = self.needed, None
        return needed

    @property
    def extra(self) -> int:
        """Weights that each acted token reads beside those of kept entries."""
        return 0

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (rows, acted tokens, features) -> what takes its place, and which entries are kept (bool)."""

    def install(self, acting: Acting) -> list[Any]:
        """Puts the gate on the model; returns the hooks' handles."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (acting.gate(self, args[0]), *args[1:])

        def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return acting.gate(self, output)

        if self.after:
            return [self.module.register_forward_hook(behind)]
        return [self.module.register_forward_pre_hook(before)]


@dataclass
class Acting:
    """Which tokens of a call are acted on, and the tallies. ``sparse``: of a prompt's tokens, how many at its end;
    decoded tokens (behind a cache, or a single one) are all acted on. ``watched=False``: nothing is counted."""

    sparse: Callable[[int], int]
    watched: bool = True
    phase: int = PREFILL
    tallies: dict[str, Tally] = field(default_factory=dict)

    def first(self, tokens: int) -> int:
        """Index of the first token that is acted on; ``tokens`` where none is."""
        return 0 if self.phase == DECODE else tokens - min(tokens, self.sparse(tokens))

    def gate(self, gate: Gate, x: Tensor) -> Tensor:
        """x: (rows, tokens, features) with its acted tokens gated, and counted."""
        rows, tokens, _ = x.shape
        first = self.first(tokens)
        kept = entries = 0
        gate.needed = None
        if first < tokens:
            gated, keep = gate(x[:, first:])
            x = gated if first == 0 else torch.cat([x[:, :first], gated], dim=1)
            entries = keep.numel()
            kept = int(keep.sum()) if self.watched else 0
            if gate.unneeded and rows * tokens == 1:
                gate.needed = keep.flatten()
        if not self.watched:
            return x
        acted = rows * (tokens - first)
        for linear, weights in gate.spares:
            tally = self.tallies.setdefault(linear.name, Tally())
            tally.tokens[self.phase] += rows * tokens
            tally.acted[self.phase] += acted
            tally.used[self.phase] += kept * weights + acted * gate.extra
            tally.entries += entries
            tally.kept += kept
        return x

    @contextmanager
    def on(self, model: nn.Module, gates: Sequence[Gate]) -> Iterator[None]:
        """The gates act on ``model`` inside, and phases are told apart; all hooks are removed afterwards."""

        def phase(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
            cache = caching.cache_given(kwargs)
            cached = cache is not None and cache.get_seq_length() > 0
            self.phase = DECODE if cached or (ids is not None and ids.shape[1] == 1) else PREFILL

        handles = [model.register_forward_pre_hook(phase, with_kwargs=True)]
        try:
            for gate in gates:
                gate.acts, gate.watched = True, self.watched
                handles += gate.install(self)
            yield
        finally:
            for gate in gates:
                gate.acts = False
            for handle in handles:
                handle.remove()
            self.phase = PREFILL


@dataclass
class Gating:
    """A fitted method of activation sparsity, ready to act on its model (an ``Attachment``).

    ``frame``: what the model is inside of while the gates act (a transform of its weights), if anything;
    ``expected``: the sparsity asked of single layers; ``index``: FLOPs per token of all that is added;
    ``more``: further record columns once the model has run. Columns of every method: ``density_linear``,
    ``sparse_tokens``, ``activation_sparsity`` (see below)."""

    method: str
    asked: float | None
    tolerance: float
    model: nn.Module
    blocks: list[GatedBlock]
    gates: list[Gate]
    sparse: Callable[[int], int]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    frame: Callable[[], AbstractContextManager[None]] = nullcontext
    expected: Mapping[str, float] = field(default_factory=dict)
    index: float = 0.0
    more: Callable[[], dict[str, Any]] = dict
    warnings: list[str] = field(default_factory=list)
    target: str = "activations"
    watched: bool = True
    acting: Acting | None = None

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What is attached inside neither counts nor compares anything: for measuring milliseconds."""
        self.watched = False
        try:
            yield
        finally:
            self.watched = True

    @property
    def skips(self) -> tuple[list[str], dict[str, Callable[[], Tensor | None]]]:
        """Names of linear layers: of those whose inputs are zeroed, and of those whose outputs are not all needed,
        with what tells which are."""
        outputs = {linear.name: gate.take for gate in self.gates for linear in gate.unneeded}
        return [gate.zeroed.name for gate in self.gates], outputs

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The gates act inside, counting anew."""
        self.acting = Acting(self.sparse, self.watched)
        with ExitStack() as stack:
            stack.enter_context(self.frame())
            stack.enter_context(self.acting.on(self.model, self.gates))
            yield

    def fitted(self) -> dict[str, Tensor]:
        """Thresholds and whatever else was learned from calibration data, with what identifies the model."""
        return self.tensors

    def counted(self) -> Counted:
        """``achieved``: of the weights that the gated layers hold, the share that acted tokens did not use."""
        tallies = {} if self.acting is None else self.acting.tallies
        linears = {linear.name: linear for block in self.blocks for linear in block.linears.values()}
        rows: list[dict[str, object]] = []
        for name, tally in tallies.items():
            total = sum(tally.acted) * linears[name].weights
            skipped = total - sum(tally.used)
            row: dict[str, object] = {"layer": name, "method": self.method, "pattern": "unstructured"}
            row |= {"asked": self.expected.get(name, self.asked), "zeros": skipped, "total": total}
            rows.append(row | {"achieved": skipped / total if total else 0.0})
        zeros, total = _sum(rows, "zeros"), _sum(rows, "total")
        if not total:
            return Counted(acted=False, achieved=0.0, rows=rows, warnings=self.warnings)
        shares = {name: _shares(tally, linears[name]) for name, tally in tallies.items()}
        per_token = {name: 1 - float(str(row["achieved"])) for name, row in zip(tallies, rows, strict=True)}
        columns = {"density_linear": density_linear(self.blocks, per_token), **_columns(tallies), **self.more()}
        extra = self.index

        def prefill(length: int) -> float:
            return extra * length

        def decode(length: int) -> float:
            return extra

        saving = Saving(shares, index_prefill=prefill, index_decode=decode)
        return Counted(True, zeros / total, rows, columns, saving, self.warnings)


def _sum(rows: Sequence[dict[str, Any]], key: str) -> int:
    return sum(int(row[key]) for row in rows)


def _shares(tally: Tally, linear: Linear) -> tuple[float, float]:
    """Shares of the layer's weights that a token of a prompt and a decoded token use. A decoded token is like the
    tokens acted on in prompts where the task decoded none."""
    whole = linear.weights
    prompt = tally.used[PREFILL] + (tally.tokens[PREFILL] - tally.acted[PREFILL]) * whole
    prefill = prompt / (tally.tokens[PREFILL] * whole) if tally.tokens[PREFILL] else 1.0
    places = [DECODE] if tally.acted[DECODE] else [PREFILL]
    acted = sum(tally.acted[place] for place in places)
    return prefill, sum(tally.used[place] for place in places) / (acted * whole) if acted else 1.0


def density_linear(blocks: Sequence[GatedBlock], shares: Mapping[str, float]) -> float:
    """Share of the weights of ALL linear layers of the blocks that a token uses, on which methods compare.
    ``shares``: by layer; one that is not named is used whole."""
    linears = [linear for block in blocks for linear in block.linears.values()]
    used = sum(linear.weights * shares.get(linear.name, 1.0) for linear in linears)
    return used / sum(linear.weights for linear in linears)


def _columns(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """``sparse_tokens``: share of the tokens acted on; ``activation_sparsity``: share of the gated entries that were
    dropped, however many weights hang on them."""
    acted = sum(sum(tally.acted) for tally in tallies.values())
    tokens = sum(sum(tally.tokens) for tally in tallies.values())
    entries = sum(tally.entries for tally in tallies.values())
    kept = sum(tally.kept for tally in tallies.values())
    return {"sparse_tokens": acted / tokens, "activation_sparsity": 1 - kept / entries}
