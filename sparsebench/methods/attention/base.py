"""What a method of sparse prefill attention is: the contract of the family, and how a stack of them is applied.

A method says which columns, blocks or ranges the queries of one prompt compute; attention over them is computed in one
place (the plug), exactly, and counted here in both ways: ``sparsity_mask``, pairs left out over the causal triangle
(``achieved`` is this one for every method), and ``sparsity_reported``, what the method's paper calls sparsity. It acts
on the first forward of a sequence; tokens that follow through the cache are dense.

``sparsity`` is a target. Where a method's own knob has no closed form for it, the knob is found for each prompt and
layer, the same for all heads, by searching the value whose mask comes closest. The papers instead fix one value per
length for all layers: what a fixed value does is seen by giving the native option, and ``sparsity`` then is not used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsebench.costs.flops import Attention, attention_of
from sparsebench.costs.saving import Saving
from sparsebench.declare import Declared, option, options_of
from sparsebench.errors import UserError
from sparsebench.methods.attention.on_kernels import KernelUse, Part, attend
from sparsebench.methods.attention.selections import Heads, Selection
from sparsebench.methods.base import Applied, Counted, Surroundings
from sparsebench.models.plug import Allowed, Call, Handler, Work, plugged, positions_of, reach

Knob = float


@dataclass(frozen=True)
class AttentionMethod(Declared, ABC):
    """Base of sparse prefill methods. ``knobs``: the native options that set the sparsity in its place; ``within``: the
    options that count tokens of a prompt, which must have so many; ``sizes``: those that leave nothing out of a prompt
    when they are too large for it."""

    sparsity: float | None = option(
        None,
        "pairs left out / causal pairs, a target for each prompt and layer; the run's sparsity if not given",
        low=0.0,
        below=1.0,
    )

    knobs: ClassVar[tuple[str, ...]] = ()
    within: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 0.03  # knobs are whole numbers, blocks are coarse

    @property
    def asked(self) -> float | None:
        """The sparsity to reach; None where a native knob was given."""
        if any(getattr(self, name) is not None for name in self.knobs):
            return None
        return 0.5 if self.sparsity is None else self.sparsity

    def name(self, option_name: str) -> str:
        """An option as the user writes it, with its value."""
        return f"method.{self.declared['name']}.{option_name}={getattr(self, option_name)}"

    def check_model(self, model: PreTrainedModel) -> None:
        """UserError when an option does not fit the model or another option. Changes nothing."""

    def check_tokens(self, tokens: int) -> None:
        """UserError when an option does not fit prompts of this many tokens."""
        self.check_within(tokens, "the prompt has")

    def check_within(self, tokens: int, what: str) -> None:
        """UserError when an option asks for more tokens than ``what`` says there are."""
        for name in self.within:
            given = getattr(self, name)
            if given is not None and given > tokens:
                raise UserError(f"{self.name(name)}: {what} only {tokens} tokens")

    def leaves_out(self, tokens: int) -> bool:
        """False where ``sizes`` let nothing be left out of a prompt of this many tokens, whatever it is and however
        little is asked for."""
        return True

    def check_sizes(self, lengths: Sequence[int]) -> None:
        """UserError when one of ``sizes`` is why nothing can be left out of any prompt of so many tokens."""
        if self.asked == 0 or any(self.leaves_out(tokens) for tokens in lengths):
            return
        longest = max(lengths)
        for name in self.sizes:
            given, spec = getattr(self, name), options_of(type(self))[name]
            if given == spec.default:
                continue
            smaller = range(min(given, longest), int(spec.low or 0) - 1, -1)
            most = next((size for size in smaller if replace(self, **{name: size})._serves(lengths)), None)
            if most is not None:
                raise UserError(
                    f"{self.name(name)}: leaves nothing out, as the prompt has only {longest} tokens; must be <= {most}"
                )

    def _serves(self, lengths: Sequence[int]) -> bool:
        """Whether something can be left out of the longest prompt, with options that fit all of them."""
        if not self.leaves_out(max(lengths)):
            return False
        try:
            self.check_lengths(lengths)
        except UserError:
            return False
        return True

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """UserError when an option does not fit prompts of so many tokens: sizes that follow from a prompt's length
        grow with it, so the shortest and the longest speak for all."""
        for tokens in (min(lengths), max(lengths)):
            self.check_tokens(tokens)

    def fit(self, around: Surroundings) -> dict[str, Tensor]:
        """What is learned from calibration data, by name, on the CPU; ``Heads.learned`` holds it later."""
        return {}

    def native(self, tokens: int) -> Knob | None:
        """The native knob for prompts of this length, where it was given or follows from the target."""
        return None

    def estimate(self, heads: Heads) -> Any:
        """What is looked at to choose: scores, counts; once per prompt and layer."""
        return None

    def span(self, heads: Heads, seen: Any) -> tuple[Knob, Knob]:
        """The knob's range: from the fewest pairs to the most. Two ints: only whole numbers."""
        raise NotImplementedError

    @abstractmethod
    def build(self, heads: Heads, seen: Any, knob: Knob) -> Selection:
        """What is computed with this knob."""

    def select(self, heads: Heads) -> Selection:
        """What is computed of one prompt in one layer."""
        if self.asked == 0:
            return Selection(heads.tokens)
        self.check_tokens(heads.tokens)
        seen = self.estimate(heads)
        knob = self.native(heads.tokens)
        if knob is None:
            target = 1 - (self.asked or 0.0)
            low, high = self.span(heads, seen)
            knob = search(low, high, target, lambda value: self.build(heads, seen, value).density)
        return self.build(heads, seen, knob)

    def index_flops(self, tokens: int, layer: Attention, learned: Mapping[str, Tensor]) -> float:
        """FLOPs of choosing, for one layer and a prompt of so many tokens; ``learned``: what ``fit`` returned."""
        return 0.0

    def index_flops_of(self, tokens: int, layers: Sequence[Attention], learned: Mapping[str, Tensor]) -> float:
        """``index_flops`` of all layers of a model."""
        return sum(self.index_flops(tokens, layer, learned) for layer in layers)

    def columns(self) -> dict[str, Any]:
        """More columns of the record."""
        return {}


def search(low: Knob, high: Knob, target: float, density: Callable[[Knob], float], close: float = 0.003) -> Knob:
    """The value in low .. high whose density (not decreasing) is nearest to ``target``: by interpolation and halving in
    turn, until within ``close`` or nothing is between."""
    whole = isinstance(low, int) and isinstance(high, int)
    below, above = density(low), density(high)
    if below >= target or above <= target:
        return low if below >= target else high
    best = min(((abs(below - target), low), (abs(above - target), high)))
    for turn in range(24):
        if best[0] <= close or (whole and high - low <= 1):
            break
        share = (target - below) / (above - below) if turn % 2 == 0 else 0.5
        guess = low + (high - low) * min(0.95, max(0.05, share))
        if whole:
            guess = min(int(high) - 1, max(int(low) + 1, round(guess)))
        found = density(guess)
        best = min(best, (abs(found - target), guess))
        if found < target:
            low, below = guess, found
        else:
            high, above = guess, found
    return best[1]


def scaled(given: int | None, paper: int, tokens: int, share: int, least: int) -> int:
    """A size that was given, or the paper's, but at most one ``share``-th of the prompt and at least ``least``."""
    return given if given is not None else max(least, min(paper, tokens // share))


def block_of(given: int | None, paper: int, tokens: int) -> int:
    """A block size that was given, or the paper's; on short prompts a power of two below a 64th, at least 8."""
    if given is not None:
        return given
    return min(paper, max(8, 1 << max(0, (tokens // 64).bit_length() - 1)))


class Chosen(Allowed):
    """The selections of a batch as one mask: ``parts`` holds (row, first and last + 1 real position, selection);
    ``shape``: rows, heads, columns; ``kernels``: where kernels may compute it, what became of that."""

    def __init__(
        self, parts: Sequence[Part], shape: tuple[int, int, int], device: torch.device, kernels: KernelUse | None = None
    ) -> None:
        super().__init__()
        self.parts, self.shape, self.device, self.kernels = parts, shape, device, kernels

    def by_kernel(self, call: Call) -> tuple[Tensor, Tensor] | None:
        return None if self.kernels is None else attend(call, self.parts, self.kernels)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._whole(torch.bool, start, stop, lambda part, a, b: part.rows(a, b))

    def bias_rows(self, start: int, stop: int) -> Tensor | None:
        if all(part.bias_rows(0, 1) is None for _, _, _, part in self.parts):
            return None
        return self._whole(torch.float32, start, stop, lambda part, a, b: part.bias_rows(a, b))

    def _whole(
        self, dtype: torch.dtype, start: int, stop: int, read: Callable[[Selection, int, int], Tensor | None]
    ) -> Tensor:
        batch, heads, columns = self.shape
        whole = torch.zeros(batch, heads, stop - start, columns, dtype=dtype, device=self.device)
        for row, first, last, part in self.parts:
            a, b = max(start, first), min(stop, last)
            found = read(part, a - first, b - first) if a < b else None
            if found is not None:
                whole[row, :, a - start : b - start, first:last] = found.to(self.device)
        return whole


@dataclass
class LayerCount:
    """Sums over the prompts that went through one layer."""

    computed: float = 0.0
    dense: float = 0.0
    reported: float = 0.0
    prompts: int = 0
    extra: dict[str, float] = field(default_factory=dict)


@dataclass
class SparseAttention(Handler):
    """A fitted method, attached: chooses at each prefill and counts."""

    method: str
    asked: float | None
    tolerance: float
    how: AttentionMethod
    model: PreTrainedModel
    tensors: dict[str, Tensor] = field(default_factory=dict)
    target: str = "attention"
    counts: dict[int, LayerCount] = field(default_factory=dict)
    chosen: Chosen | None = None
    kernels: KernelUse | None = None

    @contextmanager
    def on_kernels(self) -> Iterator[KernelUse]:
        """Inside, what can be computed by kernels is, wherever the method is attached."""
        self.kernels = KernelUse()
        try:
            yield self.kernels
        finally:
            self.kernels = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Acts inside the context, which starts counting anew."""
        self.counts = {}
        with plugged(self.model, self):
            yield

    def allow(self, call: Call) -> Allowed | None:
        if call.phase != "prefill":
            return None
        parts = []
        for row, (first, last) in enumerate(extents(call.real)):
            parts.append((row, first, last, self.how.select(heads_of(call, row, first, last, self.tensors))))
        batch, heads = call.query.shape[:2]
        self.chosen = Chosen(parts, (batch, heads, call.key.shape[2]), call.query.device, self.kernels)
        return self.chosen

    def after(self, call: Call, work: Work) -> None:
        if self.chosen is None:
            return
        count = self.counts.setdefault(call.index, LayerCount())
        computed, dense = work.computed.double().mean(dim=1), work.dense.double()
        count.computed += float(computed.sum())
        count.dense += float(dense.sum())
        for row, _, _, part in self.chosen.parts:
            element = 1 - float(computed[row] / dense[row])
            count.reported += element if part.reported is None else float(part.reported.double().mean())
            count.prompts += 1
            for name, value in part.extra.items():
                count.extra[name] = count.extra.get(name, 0.0) + value
        self.chosen = None

    def counted(self) -> Counted:
        """What was left out inside the last context."""
        found = [self.counts[index] for index in sorted(self.counts)]
        computed, dense = sum(one.computed for one in found), sum(one.dense for one in found)
        prompts = sum(one.prompts for one in found)
        if not prompts:
            return Counted(False, 0.0)
        achieved = 1 - computed / dense
        names = {name for one in found for name in one.extra}
        extra = {name: sum(one.extra.get(name, 0.0) for one in found) / prompts for name in sorted(names)}
        reported = sum(one.reported for one in found) / prompts
        columns = {"sparsity_mask": achieved, "sparsity_reported": reported, **extra, **self.how.columns()}
        return Counted(True, achieved, self._rows(), columns, self._saving(computed / dense))

    def fitted(self) -> dict[str, Tensor]:
        return self.tensors

    def _rows(self) -> list[dict[str, object]]:
        return [
            {
                "layer": f"attention.{index}", "method": self.method, "asked": self.asked, "pattern": "unstructured",
                "achieved": 1 - count.computed / count.dense, "zeros": count.dense - count.computed,
                "total": count.dense, "reported": count.reported / count.prompts,
            }
            for index, count in sorted(self.counts.items())
        ]  # fmt: skip

    def _saving(self, pairs: float) -> Saving:
        how, model = self.how, self.model
        if how.asked == 0:  # nothing is looked for
            return Saving(pairs_prefill=pairs)
        return Saving(
            pairs_prefill=pairs,
            index_prefill=lambda length: how.index_flops_of(length, attention_of(model), self.tensors),
        )


def extents(real: Tensor) -> list[tuple[int, int]]:
    """The first real position of each row and the one behind its last: real (B, L) bool."""
    places = []
    for row in real:
        where = row.nonzero()[:, 0]
        places.append((int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0))
    return places


def heads_of(call: Call, row: int, first: int, last: int, learned: dict[str, Tensor]) -> Heads:
    """One row of a batch as a prompt of its own: its real positions first .. last - 1."""

    def before_rotary() -> tuple[Tensor, Tensor]:
        query, key = call.unrotated()
        return query[row, :, first:last], key[row, :, first:last]

    query, key, value = (part[row, :, first:last] for part in (call.query, call.key, call.value))
    return Heads(call.index, query, key, value, call.scaling, before_rotary, learned, call.rotary is not None)


Named = tuple[str, AttentionMethod]


def check(stack: Sequence[Named], model: nn.Module) -> None:
    """UserError when the model's attention cannot be reached or a method's options do not fit. Changes nothing."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model: {type(model).__name__} is no Hugging Face decoder, so methods cannot reach its attention"
        )
    reach(model)
    context = positions_of(model)
    for _, method in stack:
        method.check_model(model)
        if context is not None:
            method.check_within(context, "the model's context has")


def check_prompts(stack: Sequence[Named], model: nn.Module, lengths: Iterable[int]) -> None:
    """UserError when a method's options do not fit prompts of so many tokens. Changes nothing."""
    known = list(lengths)
    for _, method in stack:
        method.check_lengths(known)
        method.check_sizes(known)  # some may be dense


def apply(stack: Sequence[Named], around: Surroundings) -> Applied:
    """Fits each method of the stack; the model stays as it is, and they act once they are attached."""
    applied = Applied()
    for label, method in stack:
        model, learned = around.loaded.model, method.fit(around)
        applied.attachments.append(SparseAttention(label, method.asked, method.tolerance, method, model, learned))
    return applied
