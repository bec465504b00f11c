"""Bytes that a model's weights and its KV cache take, index overhead included.

Each matrix is stored in the smallest of these formats, none of which loses anything (``size`` = bytes per value):

- ``dense``: every value;
- ``n:m``: at most n kept values in each group of m along the input dimension; ``numel * n / m`` slots (a group
  with fewer still fills n), each a value and a position of ceil(log2 m) bits: 2:4 is 2 bits per slot;
- ``bitmap``: one bit per entry, then the nonzero values;
- ``csr``: the nonzero values, each with a 4-byte column, and ``rows + 1`` 4-byte row offsets.

A pattern can be real and yet not the smallest: 4:8 in 16 bits takes 76 bits per group, its bitmap 72.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsebench.costs.flops import attention_of, matrices
from sparsebench.costs.saving import Saving
from sparsebench.kernels.stored import stored_form
from sparsebench.models.base import Read, as_it_is

GROUPS = (2, 4, 8, 16, 32)  # the m of the n:m patterns looked for


@dataclass(frozen=True)
class Storage:
    """Stored bytes of a model. ``dense``: every parameter once; ``sparse``: each matrix in its smallest format.

    ``format``: the one that stores most of the matrices, weighed by their dense bytes, head left out.
    ``per_layer``: one dict per matrix with ``name``, ``rows`` (outputs), ``cols`` (inputs), ``nonzero``,
    ``format``, ``dense_bytes``, ``bytes``.
    """

    dense: int
    sparse: int
    format: str
    per_layer: list[dict[str, Any]]

    def read(self, saving: Saving) -> float:
        """Bytes of weights that one decoded token reads: of each matrix the share that is used, of the rest all
        (embedding included, an upper bound)."""
        skipped = ((1.0 - saving.linear.get(one["name"], (1.0, 1.0))[1]) * one["bytes"] for one in self.per_layer)
        return float(self.sparse - sum(skipped))


def bitmap_bytes(numel: int, nnz: int, itemsize: int) -> int:
    """One bit per entry (whole bytes) and the nonzero values."""
    return -(-numel // 8) + nnz * itemsize


def csr_bytes(rows: int, nnz: int, itemsize: int) -> int:
    """Nonzero values with 4-byte columns, and 4-byte row offsets."""
    return nnz * itemsize + 4 * (nnz + rows + 1)


def nm_bytes(nnz: int, itemsize: int, m: int) -> int:
    """``nnz`` kept values, each with its position in a group of ``m`` in ceil(log2 m) bits (whole bytes)."""
    return nnz * itemsize + -(-nnz * (m - 1).bit_length() // 8)


def smallest(weight: torch.Tensor) -> tuple[str, int]:
    """(format, bytes) of the smallest format of ``weight`` (out, in), in its dtype. Of equals: dense, n:m, bitmap."""
    kept = weight != 0
    (rows, cols), numel, itemsize = weight.shape, weight.numel(), weight.element_size()
    nnz = int(torch.count_nonzero(kept))
    best = min(
        (numel * itemsize, 0, "dense"),
        (bitmap_bytes(numel, nnz, itemsize), 2, "bitmap"),
        (csr_bytes(rows, nnz, itemsize), 3, "csr"),
    )
    for m in GROUPS:
        least = max(1, -(-nnz * m // numel)) if numel else 1  # some group holds at least the average
        if not numel or cols % m or (nm_bytes(numel // m * least, itemsize, m), 1, "") >= best:
            continue  # a look at each group is the slow part: only where it can pay
        n = max(1, int(kept.reshape(rows, cols // m, m).sum(-1, dtype=torch.uint8).max()))
        best = min(best, (nm_bytes(numel // m * n, itemsize, m), 1, f"{n}:{m}"))
    return best[2], best[0]


def weight_bytes(model: PreTrainedModel, read: Read = as_it_is) -> Storage:
    """Stored bytes of ``model`` in the dtype its parameters have now; buffers are not counted.

    A layer or embedding that a method left in a form of its own (``stored_form``) takes what that takes.
    Parameters shared by several modules count once. Without such a form an embedding, and a head that is tied to it, is
    stored dense, whatever its zeros, as is every parameter that is not the weight of a linear layer. UserError for
    weights that are packed or offloaded.
    """
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    sparse, per_layer, votes = dense, [], Counter[str]()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    seen = {id(module.weight) for module in embeddings}
    for module in embeddings:
        if own := stored_form(module, module.weight):
            sparse += own.nbytes - module.weight.nbytes
    head = model.get_output_embeddings()
    for name, stored, weight in matrices(model, read):
        if id(stored) in seen:
            continue
        seen.add(id(stored))
        as_dense, own = weight.numel() * weight.element_size(), stored_form(model.get_submodule(name), weight)
        form, size = smallest(weight) if own is None else (own.format, own.nbytes)
        sparse += size - as_dense
        if model.get_submodule(name) is not head:
            votes[form] += as_dense
        rows, cols = weight.shape
        nonzero = int(torch.count_nonzero(weight))
        per_layer.append(
            {"name": name, "rows": rows, "cols": cols, "nonzero": nonzero, "format": form,
             "dense_bytes": as_dense, "bytes": size}
        )  # fmt: skip
    return Storage(dense, sparse, votes.most_common(1)[0][0] if votes else "dense", per_layer)


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes one token adds to the KV cache of one sequence: ``2 * kv_heads * head_dim * bytes per value`` summed
    over the layers, in the model's dtype (layers with a sliding window stop growing at their window)."""
    values = sum(2 * layer.kv_heads * layer.head_dim for layer in attention_of(model))
    return values * model.dtype.itemsize
