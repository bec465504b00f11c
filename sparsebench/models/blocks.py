"""The walk over a decoder's blocks: where they are, what they were called with, how to call them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError

_TOKENS_PER_CALL = 8192  # rows are grouped to about this many tokens; fixed, so results never depend on memory


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of the decoder blocks of any Hugging Face causal decoder."""
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return name, module
    raise UserError(f"model: {type(model).__name__} has no list of {wanted} decoder blocks that could be walked")


class Groups(Protocol):
    """Hidden states in groups of rows, each (rows, tokens, hidden size): a list, or what stands for one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def __getitem__(self, place: int, /) -> Tensor: ...
    def __setitem__(self, place: int, tensor: Tensor, /) -> None: ...


class Blocks:
    """The decoder blocks of a model that is in memory as a whole, and what a walk asks of any model's: subclasses
    keep only one block there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix, self.modules = decoder_blocks(model)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def device(self) -> torch.device:
        """Where the blocks run."""
        return next(self.model.parameters()).device

    def bring_front(self) -> None:
        """Sees to it that what stands before the blocks (the embedding) is in memory, until a block is brought."""

    def bring(self, index: int) -> nn.Module:
        """The block, in memory until another one is brought."""
        return self.modules[index]

    def done(self, index: int) -> None:
        """The block, which was brought last, stays as it is now."""

    def hold(self, hidden: Iterable[Tensor]) -> Groups:
        """Hidden states, kept where this model's are kept. What is put into the result stays there; the tensors that
        were given are not changed."""
        return list(hidden)


Kind = tuple[type[nn.Module], int]


def kind_of(block: nn.Module) -> Kind:
    """What blocks that do the same have in common: their class, and how many linear layers there are."""
    return type(block), len(_linears(block))


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


@dataclass
class BlockCalls:
    """How each block was called for one shape of input: positional and keyword arguments behind the
    hidden states (attention mask, position embeddings ...; they may differ from block to block). ``tuples``: whether
    the block that was called last put out a tuple; ``once``: the kinds of blocks that were seen to call each of their
    linear layers once."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tuples: bool = False
    once: set[Kind] = field(default_factory=set)

    def __call__(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden: (rows, tokens, hidden size) -> the block's output of the same shape."""
        args, kwargs = self.arguments[index]
        output: Tensor | tuple[Tensor, ...] = block(hidden, *args, **kwargs)
        self.tuples = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class BlockInputs:
    """Hidden states in front of the current block, in groups of rows, with the calls that fit them.

    ``fitting`` gives the calls for any other number of rows."""

    hidden: Groups
    calls: list[BlockCalls]
    fitting: Callable[[int], BlockCalls]

    @property
    def once(self) -> set[Kind]:
        """The kinds of blocks that call each of their linear layers once, as far as is known."""
        return set[Kind]().union(*(call.once for call in self.calls))

    def run(self, index: int, block: nn.Module) -> list[Tensor]:
        """The block's outputs for every group of rows."""
        return [call(index, block, hidden) for hidden, call in zip(self.hidden, self.calls, strict=True)]

    def run_rows(self, index: int, block: nn.Module, rows: range) -> Tensor:
        """The block's outputs for these rows, in one call: (rows, tokens, hidden size)."""
        return self.fitting(len(rows))(index, block, take_rows(self.hidden, rows))

    def look(self, index: int, block: nn.Module) -> None:
        """Runs the block for the sake of whoever hooked its parts; they end a call with ``Enough``."""
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            with suppress(Enough):
                call(index, block, hidden)

    def advance(self, index: int, block: nn.Module) -> None:
        """Puts the block's outputs in the place of its inputs, one group at a time."""
        for place, call in enumerate(self.calls):
            self.hidden[place] = call(index, block, self.hidden[place])


def take_rows(groups: Iterable[Tensor], rows: range) -> Tensor:
    """Consecutive rows of a list of groups of rows, as one tensor."""
    found, first = [], 0
    for group in groups:
        found.append(group[max(0, rows.start - first) : max(0, rows.stop - first)])
        first += len(group)
    return torch.cat(found)


class Enough(Exception):
    """Raised by a hook: nobody needs the rest of this call of a block or a model."""


@torch.no_grad()
def capture(blocks: Blocks, windows: Tensor, rows: int | None = None) -> BlockInputs:
    """Runs ``windows`` (sequences, tokens) up to the first block; replays of the blocks follow.

    One forward per distinct shape records all arguments of every block; the rest stop at block 0. ``rows``: of a
    group; about 8192 tokens where not given. The hidden states are held as ``blocks`` holds them.
    """
    by_shape: dict[torch.Size, BlockCalls] = {}
    groups = windows.split(rows or max(1, _TOKENS_PER_CALL // windows.shape[1]))
    blocks.bring_front()
    hidden = blocks.hold(_first_input(blocks, group) for group in groups)
    for group in groups:
        if group.shape not in by_shape:
            by_shape[group.shape] = _arguments(blocks, group)

    @torch.no_grad()
    def fitting(count: int) -> BlockCalls:
        shape = windows[:count].shape
        if shape not in by_shape:
            by_shape[shape] = _arguments(blocks, windows[:count])
        return by_shape[shape]

    return BlockInputs(hidden, [by_shape[group.shape] for group in groups], fitting)


def _arguments(blocks: Blocks, ids: Tensor) -> BlockCalls:
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            seen[index] = (args[1:], rest)
            if len(seen) == len(blocks):
                raise Enough
            blocks.bring(index)

        return hook

    called: Counter[nn.Module] = Counter()
    count = lambda module, args: called.update([module])  # noqa: E731
    whole = list(blocks.modules)[:-1]  # nothing runs behind the last one's arguments
    blocks.bring_front()
    handles = [b.register_forward_pre_hook(record(i), with_kwargs=True) for i, b in enumerate(blocks.modules)]
    handles += [layer.register_forward_pre_hook(count) for block in whole for layer in _linears(block)]
    _forward(blocks, ids, handles)
    once = {kind_of(block) for block in whole if all(called[layer] == 1 for layer in _linears(block))}
    return BlockCalls([seen[index] for index in range(len(blocks))], once=once)


def _first_input(blocks: Blocks, ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Enough

    _forward(blocks, ids, [blocks.modules[0].register_forward_pre_hook(hook, with_kwargs=True)])
    return found[0]


def _forward(blocks: Blocks, ids: Tensor, handles: list[Any]) -> None:
    """Runs the model until a hook has seen enough, then removes the hooks."""
    try:
        with suppress(Enough):
            blocks.model(input_ids=ids.to(blocks.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
