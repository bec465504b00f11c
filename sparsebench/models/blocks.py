"""The walk over a decoder's blocks: where they are, what they were called with, how to call them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass
class BlockCalls:
    """How each block was called for one shape of input: positional and keyword arguments behind the
    hidden states (attention mask, position embeddings ...; they may differ from block to block)."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def __call__(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """hidden: (rows, tokens, hidden size) -> the block's output of the same shape."""
        args, kwargs = self.arguments[index]
        output: Tensor | tuple[Tensor, ...] = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class BlockInputs:
    """Hidden states in front of the current block, in groups of rows, with the calls that fit them.

    ``fitting`` gives the calls for any other number of rows."""

    hidden: list[Tensor]
    calls: list[BlockCalls]
    fitting: Callable[[int], BlockCalls]

    def run(self, index: int, block: nn.Module) -> list[Tensor]:
        """The block's outputs for every group of rows."""
        return [call(index, block, hidden) for hidden, call in zip(self.hidden, self.calls, strict=True)]

    def run_rows(self, index: int, block: nn.Module, rows: range) -> Tensor:
        """The block's outputs for these rows, in one call: (rows, tokens, hidden size)."""
        return self.fitting(len(rows))(index, block, take_rows(self.hidden, rows))


def take_rows(groups: list[Tensor], rows: range) -> Tensor:
    """Consecutive rows of a list of groups of rows, as one tensor."""
    found, first = [], 0
    for group in groups:
        found.append(group[max(0, rows.start - first) : max(0, rows.stop - first)])
        first += len(group)
    return torch.cat(found)


class _Captured(Exception):
    """Ends a forward pass once the first block's input is known."""


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, windows: Tensor) -> BlockInputs:
    """Runs ``windows`` (sequences, tokens) up to the first block; replays of the blocks follow.

    One whole forward per distinct shape records all arguments of every block; the rest stop at block 0.
    """
    device = next(model.parameters()).device
    rows = max(1, _TOKENS_PER_CALL // windows.shape[1])
    by_shape: dict[torch.Size, BlockCalls] = {}
    hidden: list[Tensor] = []
    calls: list[BlockCalls] = []
    for group in windows.split(rows):
        if group.shape not in by_shape:
            by_shape[group.shape] = _arguments(model, blocks, group.to(device))
        hidden.append(_first_input(model, blocks[0], group.to(device)))
        calls.append(by_shape[group.shape])

    @torch.no_grad()
    def fitting(count: int) -> BlockCalls:
        shape = windows[:count].shape
        if shape not in by_shape:
            by_shape[shape] = _arguments(model, blocks, windows[:count].to(device))
        return by_shape[shape]

    return BlockInputs(hidden, calls, fitting)


def _arguments(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> BlockCalls:
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            seen[index] = (args[1:], rest)

        return hook

    handles = [b.register_forward_pre_hook(record(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return BlockCalls([seen[index] for index in range(len(blocks))])


def _first_input(model: nn.Module, block: nn.Module, ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Captured

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=ids, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return found[0]
