"""Attention that skips: blocks of keys at prefill, pruned entries of the cache at decode.

``BlockIndex`` lists which key blocks each query block reads; ``Records`` holds a cache whose tokens each keep the same
number of entries (a bitmap and the kept values, at a fixed distance, so a token is reached and appended without
offsets). The operations run in C on the CPU, in Triton on the GPU, and in torch (``reference``) where neither can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sparsebench.kernels import gpu, reference
from sparsebench.kernels.bits import packed_bits, unpacked_bits
from sparsebench.kernels.build import library
from sparsebench.kernels.ops import CODES, check_status

BLOCK = 64  # queries or keys to a block
WORD = 64  # dimensions to a mask word
LARGEST_DIM = 256
_SPARE = 64  # bytes behind the last record, for kernels that read whole vectors


@dataclass(frozen=True)
class BlockIndex:
    """Key blocks of 64 that each query block of 64 reads. ``ptr``: int32 (heads * query_blocks + 1); ``idx``: int32,
    key blocks, ascending per query block. ValueError if they do not describe ``queries`` x ``keys``."""

    heads: int
    queries: int
    keys: int
    ptr: Tensor
    idx: Tensor

    def __post_init__(self) -> None:
        lists = self.heads * -(-self.queries // BLOCK)
        steps = self.ptr.diff()
        ends = self.ptr.numel() == lists + 1 and int(self.ptr[0]) == 0 and int(self.ptr[-1]) == self.idx.numel()
        if self.ptr.dtype != torch.int32 or self.idx.dtype != torch.int32 or not ends or bool((steps < 0).any()):
            raise ValueError("block index: ptr must be int32, rise from 0 to len(idx), one step per query block")
        if self.idx.numel() and not 0 <= int(self.idx.min()) <= int(self.idx.max()) < -(-self.keys // BLOCK):
            raise ValueError(f"block index: a key block is outside 0 .. {-(-self.keys // BLOCK) - 1}")

    @classmethod
    def from_mask(cls, mask: Tensor, queries: int, keys: int, block: int = BLOCK) -> BlockIndex:
        """``mask``: (heads, query blocks, key blocks) bool, True = read, in blocks of a multiple of 64."""
        if block % BLOCK or mask.shape[1:] != (-(-queries // block), -(-keys // block)):
            raise ValueError(f"mask {tuple(mask.shape)}: not blocks of {block} over {queries} x {keys}")
        times = block // BLOCK
        fine = mask.repeat_interleave(times, 1).repeat_interleave(times, 2)
        fine = fine[:, : -(-queries // BLOCK), : -(-keys // BLOCK)]
        ptr = torch.zeros(fine.shape[0] * fine.shape[1] + 1, dtype=torch.int32, device=mask.device)
        ptr[1:] = fine.sum(-1).flatten().cumsum(0)
        return cls(mask.shape[0], queries, keys, ptr, fine.nonzero()[:, 2].to(torch.int32))

    def to(self, device: torch.device) -> BlockIndex:
        """The same on a device; itself if it is there."""
        return self if self.ptr.device == device else replace(self, ptr=self.ptr.to(device), idx=self.idx.to(device))

    def lists(self, head: int) -> list[Tensor]:
        """The key blocks of each query block of a head."""
        count = -(-self.queries // BLOCK)
        ends = self.ptr[head * count : (head + 1) * count + 1].tolist()
        return [self.idx[start:end] for start, end in pairwise(ends)]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex, scale: float | None = None, positions: Tensor | None = None
) -> Tensor:
    """Causal attention over the listed key blocks. q: (..., heads, queries, dim); k, v: (..., kv_heads, keys, dim).

    The queries are the last of the keys' tokens. ``positions``: int32 (..., heads, keys), where the keys were permuted
    within their sequence (then kv_heads = heads); query i sees the keys whose position is at most its own. ``blocks``
    counts all leading dimensions as heads. Returns the shape and dtype of q; rows that see no key are zero.
    ``scale``: dim ** -0.5 if not given. In bfloat16 the probabilities are rounded to bfloat16, as torch does. An index
    and positions on another device are copied for the call.
    """
    heads, kv_heads = _heads(q), _heads(k)
    queries, dim, keys = q.shape[-2], q.shape[-1], k.shape[-2]
    if v.shape != k.shape or k.shape[-1] != dim or heads % max(1, kv_heads) or queries > keys:
        raise ValueError(f"block_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if (blocks.heads, blocks.queries, blocks.keys) != (heads, queries, keys):
        raise ValueError(f"block_attention: the index is for {blocks.heads} x {blocks.queries} x {blocks.keys}")
    if positions is not None and (positions.dtype != torch.int32 or positions.numel() != heads * keys):
        raise ValueError("block_attention: positions must be int32 (heads, keys)")
    if positions is not None and kv_heads != heads:
        raise ValueError("block_attention: permuted keys need one kv head per query head")
    _contiguous("block_attention", q=q, k=k, v=v, positions=positions)
    scale = dim**-0.5 if scale is None else scale
    blocks, positions = blocks.to(q.device), None if positions is None else positions.to(q.device)
    if q.is_cuda and gpu.takes(q, k, v) and dim <= gpu.largest_dim(q.dtype):
        from sparsebench.kernels.gpu import blocks as on_gpu

        with torch.cuda.device_of(q):
            return on_gpu.attention(q, k, v, blocks.ptr, blocks.idx, scale, positions)
    kernels = library() if _fits(q, k, v) else None
    if kernels is None:
        return reference.block_attention(q, k, v, blocks, scale, positions)
    out = torch.empty_like(q)
    status = kernels.calls.sb_blocks_attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), CODES[q.dtype], heads, kv_heads, queries, keys, dim, scale,
        keys - queries, blocks.ptr.data_ptr(), blocks.idx.data_ptr(),
        None if positions is None else positions.data_ptr(), out.data_ptr(), kernels.threads(),
    )  # fmt: skip
    check_status("block_attention", status)
    return out


@dataclass
class Records:
    """The pruned keys or values of a cache in bfloat16: one record per token and kv head.

    ``data``: uint8, (heads, capacity, stride) flat and 64 spare bytes; a record is ceil(dim / 64) little-endian mask
    words (bit j of word w: dimension 64 w + j was kept), then ``kept`` bfloat16 slots, zeros behind the last; the
    stride is rounded up to 16 bytes. ``tokens``: records in use per head.
    """

    heads: int
    dim: int
    kept: int
    tokens: int
    capacity: int
    data: Tensor

    @classmethod
    def empty(cls, heads: int, dim: int, kept: int, capacity: int = 0, device: torch.device | str = "cpu") -> Records:
        """No tokens yet. ``kept``: the most entries that a token keeps. ValueError for dim above 256."""
        if not 0 < dim <= LARGEST_DIM or not 0 <= kept <= dim or heads < 1:
            raise ValueError(f"records: dim={dim} must be 1 to {LARGEST_DIM}, kept={kept} 0 to dim")
        found = cls(heads, dim, kept, 0, 0, torch.empty(0, dtype=torch.uint8, device=device))
        found._grow(capacity)
        return found

    @classmethod
    def from_dense(cls, x: Tensor, kept: Tensor) -> Records:
        """x: (heads, tokens, dim), kept: the same shape, bool, on any device. Room for as many entries as the fullest
        token keeps."""
        most = int(kept.sum(-1).max()) if kept.numel() else 0
        found = cls.empty(x.shape[0], x.shape[2], most, x.shape[1], x.device)
        found.append(x, kept)
        return found

    def append(self, x: Tensor, kept: Tensor) -> None:
        """Adds tokens behind the last. x: (heads, new tokens, dim), kept bool. ValueError if one keeps too many."""
        if x.shape != kept.shape or x.shape[0] != self.heads or x.shape[2] != self.dim:
            raise ValueError(f"records of {self.heads} heads x {self.dim}: cannot take {tuple(x.shape)}")
        if kept.numel() and int(kept.sum(-1).max()) > self.kept:
            raise ValueError(f"records: a token keeps more than {self.kept} entries")
        count = x.shape[1]
        if self.tokens + count > self.capacity:
            self._grow(max(self.tokens + count, 2 * self.capacity))
        self.view[:, self.tokens : self.tokens + count] = self._packed(x.to(torch.bfloat16), kept)
        self.tokens += count

    def dense(self) -> Tensor:
        """(heads, tokens, dim) bfloat16."""
        used = self.view[:, : self.tokens]
        kept = unpacked_bits(used[..., : self._mask_bytes])[..., : self.dim]
        values = used[..., self._mask_bytes : self._mask_bytes + 2 * self.kept].contiguous().view(torch.bfloat16)
        place = (kept.cumsum(-1) - 1).clamp(0, max(0, self.kept - 1))
        if not self.kept:
            return torch.zeros(kept.shape, dtype=torch.bfloat16, device=kept.device)
        return values.gather(-1, place).masked_fill(~kept, 0)

    @property
    def stride(self) -> int:
        """Bytes per record."""
        return -(-(self._mask_bytes + 2 * self.kept) // 16) * 16

    @property
    def nbytes(self) -> int:
        """Bytes of the records in use."""
        return self.heads * self.tokens * self.stride

    @property
    def view(self) -> Tensor:
        """(heads, capacity, stride) uint8."""
        return self.data[: self.heads * self.capacity * self.stride].view(self.heads, self.capacity, self.stride)

    @property
    def _mask_bytes(self) -> int:
        return -(-self.dim // WORD) * WORD // 8

    def _packed(self, x: Tensor, kept: Tensor) -> Tensor:
        record = torch.zeros(*x.shape[:2], self.stride, dtype=torch.uint8, device=x.device)
        margin = (0, 8 * self._mask_bytes - self.dim)
        record[..., : self._mask_bytes] = packed_bits(torch.nn.functional.pad(kept, margin))
        place = torch.where(kept, kept.cumsum(-1) - 1, self.kept)  # dropped entries fall into a slot that is cut off
        slots = torch.zeros(*x.shape[:2], self.kept + 1, dtype=torch.bfloat16, device=x.device).scatter_(-1, place, x)
        values = slots[..., : self.kept].contiguous().view(torch.uint8)
        record[..., self._mask_bytes : self._mask_bytes + 2 * self.kept] = values
        return record

    def _grow(self, capacity: int) -> None:
        data = torch.zeros(self.heads * capacity * self.stride + _SPARE, dtype=torch.uint8, device=self.data.device)
        if self.tokens:
            larger = data[: self.heads * capacity * self.stride].view(self.heads, capacity, self.stride)
            larger[:, : self.tokens] = self.view[:, : self.tokens]
        self.data, self.capacity = data, capacity


def largest(x: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` entries of largest magnitude along the last dimension; of equals, the first."""
    order = x.abs().argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(-1, order, True)


def kv_attention(
    q: Tensor,
    keys: Records,
    values: Records,
    recent_keys: Tensor | None = None,
    recent_values: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one token over a pruned cache and a dense window, in one softmax.

    q: (heads, dim), float32 or bfloat16; heads share kv heads in order. recent_keys, recent_values: (kv_heads, recent,
    dim) bfloat16, the newest tokens. Returns (heads, dim) in the dtype of q; zeros if there is no token at all.
    ``scale``: dim ** -0.5 if not given. Where there is bfloat16 arithmetic (``avx512``, the GPU) queries and
    probabilities are rounded to it.
    """
    heads, dim = q.shape
    fits = (keys.heads, keys.dim, keys.tokens) == (values.heads, values.dim, values.tokens)
    if not fits or keys.dim != dim or heads % keys.heads:
        raise ValueError(f"kv_attention: {heads} x {dim} queries on {keys.heads} x {keys.dim} keys and values")
    for name, window in (("recent_keys", recent_keys), ("recent_values", recent_values)):
        wanted = recent_keys is not None and (keys.heads, recent_keys.shape[1], dim)
        if (window is None) != (recent_keys is None) or (window is not None and tuple(window.shape) != wanted):
            raise ValueError(f"kv_attention: {name} must be (kv_heads, recent, dim), both or none")
        if window is not None and window.dtype != torch.bfloat16:
            raise ValueError(f"kv_attention: {name} must be bfloat16")
    _contiguous("kv_attention", q=q, recent_keys=recent_keys, recent_values=recent_values)
    scale = dim**-0.5 if scale is None else scale
    beside = (keys.data, values.data, recent_keys, recent_values)
    if any(one is not None and one.device != q.device for one in beside):
        raise ValueError(f"kv_attention: records and recent tokens must be on the device of q ({q.device})")
    if q.is_cuda and gpu.takes(q):
        from sparsebench.kernels.gpu import records as on_gpu

        with torch.cuda.device_of(q):
            return on_gpu.attention(q, keys, values, recent_keys, recent_values, scale)
    kernels = library() if _fits(q) else None
    if kernels is None:
        return reference.kv_attention(q, keys, values, recent_keys, recent_values, scale)
    out = torch.empty_like(q)
    recent = 0 if recent_keys is None else recent_keys.shape[1]
    window_at = [None if one is None else one.data_ptr() for one in (recent_keys, recent_values)]
    if keys.capacity != values.capacity:
        raise ValueError("kv_attention: keys and values must have room for the same number of tokens")
    status = kernels.calls.sb_kv_attention(
        q.data_ptr(), CODES[q.dtype], heads, keys.heads, dim, scale, keys.data.data_ptr(), values.data.data_ptr(),
        keys.stride, values.stride, keys.capacity, keys.tokens, *window_at, recent, out.data_ptr(), kernels.threads(),
    )  # fmt: skip
    check_status("kv_attention", status)
    return out


def _heads(x: Tensor) -> int:
    """All dimensions in front of (tokens, dim), as one."""
    return int(np.prod(x.shape[:-2], dtype=np.int64))


def _fits(*tensors: Tensor) -> bool:
    """Whether the C kernels take these tensors."""
    return all(
        one.device.type == "cpu" and one.dtype in CODES and one.dtype == tensors[0].dtype for one in tensors
    ) and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))


def _contiguous(name: str, **tensors: Tensor | None) -> None:
    for what, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: {what} must be contiguous (its strides are {tensor.stride()})")
