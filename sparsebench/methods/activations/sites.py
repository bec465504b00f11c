"""Where activations can be sparse in a decoder with gated MLPs, and what calibration data puts there.

Sites of a block, by name: ``attn_in`` (input of q, k, v), ``attn_out`` (input of o), ``mlp_in`` (input of gate and
up), ``mlp_hidden`` (input of down), ``gate_in`` and ``gate_out`` (the gate's activation function: before, after).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError
from sparsebench.models.blocks import BlockInputs, Blocks, capture, decoder_blocks

SITE_OF = {
    "q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "attn_out", "gate": "mlp_in", "up": "mlp_in",
    "down": "mlp_hidden",
}  # fmt: skip
"""Linear layers of a block by short name (``q`` is the module ``q_proj``) -> the site that is their input."""
READER = {"attn_in": "q", "attn_out": "o", "mlp_in": "gate", "mlp_hidden": "down"}  # whose input is looked at


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: its full name, its short name (``q`` ... ``down``) and the module."""

    name: str
    kind: str
    module: nn.Linear

    @property
    def weights(self) -> int:
        return self.module.weight.numel()


@dataclass(frozen=True)
class GatedBlock:
    """A decoder block: its seven linear layers by short name, the gate's activation function, the rest."""

    name: str
    index: int
    module: nn.Module
    linears: dict[str, Linear]
    activation: nn.Module

    @property
    def hidden(self) -> int:
        """Width of the MLP's intermediate vector."""
        return self.linears["down"].module.in_features


def gated_blocks(model: nn.Module) -> list[GatedBlock]:
    """The decoder blocks of a model, in order. UserError when they are not attention with a gated MLP."""
    prefix, blocks = decoder_blocks(model)
    found = []
    for index, block in enumerate(blocks):
        where = f"{prefix}.{index}"
        linears: dict[str, Linear] = {}
        for name, module in block.named_modules():
            kind = name.rsplit(".", 1)[-1].removesuffix("_proj")
            if not isinstance(module, nn.Linear) or kind not in SITE_OF:
                continue
            if kind in linears:
                raise UserError(
                    f"model: {where} has more than one {kind}_proj; activation sparsity takes one MLP a block"
                )
            linears[kind] = Linear(f"{where}.{name}", kind, module)
        missing = [f"{kind}_proj" for kind in SITE_OF if kind not in linears]
        activation = next((m for n, m in block.named_modules() if n.rsplit(".", 1)[-1] == "act_fn"), None)
        if missing or activation is None:
            lacks = ", ".join(missing or ["act_fn"])
            raise UserError(
                f"model: {type(model).__name__} has no {lacks} in {where}: activation sparsity needs separate "
                "attention projections and a gated MLP, as Llama, Mistral, Qwen and Gemma have"
            )
        found.append(GatedBlock(where, index, block, linears, activation))
    return found


@dataclass
class BlockSeen:
    """A block with what the dense model's calibration data puts at the sites that were asked for.

    ``values``: by site, (rows, tokens, features) in the model's dtype; ``inputs`` replays the block on the
    dense hidden states in front of it."""

    block: GatedBlock
    values: dict[str, Tensor]
    inputs: BlockInputs

    def run(self) -> list[Tensor]:
        """The block's outputs as it is now, in groups of rows: each (rows, tokens, hidden size)."""
        return self.inputs.run(self.block.index, self.block.module)


@torch.no_grad()
def walk(model: nn.Module, windows: Tensor, sites: Sequence[str]) -> Iterator[BlockSeen]:
    """Pushes ``windows`` (sequences, tokens) block by block through the dense model, one block's activations in
    memory at a time. Whoever reads a block may hook it, and must leave it as it was."""
    blocks = gated_blocks(model)
    inputs = capture(Blocks(model), windows)
    for block in blocks:
        found: dict[str, list[Tensor]] = {site: [] for site in sites}
        handles = [_watch(block, site, found[site]) for site in sites]
        try:
            outputs = inputs.run(block.index, block.module)
        finally:
            for handle in handles:
                handle.remove()
        yield BlockSeen(block, {site: torch.cat(values) for site, values in found.items()}, inputs)
        inputs.hidden = outputs


def _watch(block: GatedBlock, site: str, into: list[Tensor]) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        into.append(args[0].detach())

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        into.append(output.detach())

    if site == "gate_out":
        return block.activation.register_forward_hook(after)
    module = block.activation if site == "gate_in" else block.linears[READER[site]].module
    return module.register_forward_pre_hook(before)
