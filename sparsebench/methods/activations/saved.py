"""Fitted tensors with what they were fitted for: written by ``save=``, read back and refused where they do not fit.

Beside its own tensors a file holds ``for_model`` (32 bytes, uint8: a digest of every parameter that is not a linear
layer of the decoder blocks, and of the names and shapes of those, which may be pruned after the fit) and
``for_sparsity`` (float64, what was asked; NaN for nothing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsebench.errors import UserError
from sparsebench.methods.activations.sites import gated_blocks
from sparsebench.methods.base import read_tensors

MODEL, SPARSITY = "for_model", "for_sparsity"


def digest(model: nn.Module) -> Tensor:
    """(32,) uint8 that tells models apart: see above."""
    inside = {f"{linear.name}.weight" for block in gated_blocks(model) for linear in block.linears.values()}
    found = hashlib.blake2b(digest_size=32)
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if name not in inside:
            found.update(parameter.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def stamped(tensors: Mapping[str, Tensor], model: nn.Module, asked: float | None) -> dict[str, Tensor]:
    """``tensors`` with what they were fitted for."""
    level = torch.tensor(float("nan") if asked is None else asked, dtype=torch.float64)
    return {**tensors, MODEL: digest(model), SPARSITY: level}


def read(where: str, file: str, model: nn.Module | None, asked: float | None) -> dict[str, Tensor]:
    """The tensors of a file. UserError naming the option (``where``) when it is no such file, or was fitted for
    another model (not looked at where None) or another sparsity."""
    found = read_tensors(f"{where}={file}", file)
    if MODEL not in found or SPARSITY not in found:
        raise UserError(f"{where}={file}: not written by save= of such a run: it lacks {MODEL} or {SPARSITY}")
    fitted_for = found.pop(MODEL)
    if model is not None and not torch.equal(fitted_for, digest(model)):
        raise UserError(f"{where}={file}: was fitted for another model; fit again without this option")
    level = float(found.pop(SPARSITY))
    if asked is not None and abs(level - asked) > 1e-9:
        raise UserError(f"{where}={file}: was fitted for sparsity={level:g}, not {asked:g}")
    return found


def require(where: str, file: str, found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError unless a file has exactly the tensors that the method, with its options, would have fitted."""
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{where}={file}: lacks {name}; was it fitted by this method with these options?")
        if tuple(found[name].shape) != shape:
            raise UserError(f"{where}={file}: {name} has shape {tuple(found[name].shape)}, not {shape}")
