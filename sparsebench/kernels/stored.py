"""The form that a method left a layer's weight in, for as long as the layer has that weight.

A masked model holds dense weights. How few bytes they take, and which zeros among them are kept entries, only the
method knows that made them; it leaves that with the layer. Whoever changes the weight afterwards knows nothing of it,
so a form is bound to the bits of its weight, and ``stored_form`` gives it only for these: a changed layer is what its
entries say.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebench.kernels.formats import GroupQuantised

_NAME = "stored_as"  # of the module's attribute, which copies of a model take along


@dataclass(frozen=True)
class Stored:
    """A layer in the form it is stored in: ``kept`` entries, zeros among them included, in ``bits`` bits.

    ``matrix``: that form for the kernels, where they know it."""

    kept: int
    bits: int
    format: str
    matrix: GroupQuantised | None

    @property
    def nbytes(self) -> int:
        """What the kernels' form takes (its zero points have 16 bits), else the bits in whole bytes."""
        return -(-self.bits // 8) if self.matrix is None else self.matrix.nbytes


def store(module: nn.Module, form: Stored, weight: Tensor) -> None:
    """Leaves ``form`` with a layer whose weight (out, in) is now ``weight``."""
    setattr(module, _NAME, (form, _digest(weight)))


def stored_form(module: nn.Module, weight: Tensor) -> Stored | None:
    """The form of a layer, if its present ``weight`` (out, in) is to the bit the one that the form was made of. None if
    it has no form, if the weight was changed since, or if it is not in memory (meta)."""
    form, digest = getattr(module, _NAME, (None, ""))
    return form if form is not None and not weight.is_meta and _digest(weight) == digest else None


def stored_matrix(module: nn.Module) -> GroupQuantised | None:
    """The matrix of a layer's form whatever its weight is now: for who compares the two entry by entry."""
    form, _ = getattr(module, _NAME, (None, ""))
    return None if form is None else form.matrix


def _digest(weight: Tensor) -> str:
    """Of dtype, shape and bits; the same on every device."""
    found = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
