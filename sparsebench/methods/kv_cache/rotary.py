"""Turning keys and queries to other rotary positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.errors import UserError
from sparsebench.models.plug import check_rotary, reach, rotates

Tables = Callable[[Tensor], tuple[Tensor, Tensor] | None]


def turned(x: Tensor, steps: Tensor, tables: Tables) -> Tensor:
    """``x`` (..., tokens, D) as it would be ``steps`` (..., tokens) int64 positions further on (negative: back).

    ``tables``: cos and sin (rows, tokens, rotated channels) at positions (rows, tokens), halves of a head turned
    against each other. A common factor of the tables (YaRN) is in ``x`` already and left out. ValueError without
    tables."""
    found = tables(steps.reshape(-1, steps.shape[-1]))
    if found is None:
        raise ValueError("the model has no rotary embedding")
    cos, sin = (part.float().view(*steps.shape, -1) for part in found)
    length = (cos * cos + sin * sin).sqrt()
    width = cos.shape[-1]
    part, rest = x[..., :width].float(), x[..., width:]
    low, high = part.chunk(2, dim=-1)
    out = (part * cos + torch.cat([-high, low], dim=-1) * sin) / length
    return torch.cat([out.to(x.dtype), rest], dim=-1)


def needs_rotary(model: PreTrainedModel, what: str, everywhere: bool = True) -> None:
    """UserError beginning with ``what`` where the model's positions are not rotary, or are rotated in another way;
    also where only some layers have them, if they must ``everywhere``."""
    if not any(name.endswith("rotary_emb") for name, _ in model.named_modules()):
        raise UserError(f"{what}: {type(model).__name__} has no rotary positions")
    modules = reach(model)
    turning = [rotates(module) for module in modules]
    if everywhere and not all(turning):
        plain = ", ".join(str(index) for index, turns in enumerate(turning) if not turns)
        raise UserError(f"{what}: {type(model).__name__} has no rotary positions in layers {plain}")
    check_rotary(modules[0])
