"""A weight as groups of consecutive inputs of one row: means, grids, the trainable form, and what they cost.

A matrix (out, in) has n = ceil(in / G) groups a row; a last shorter group is a group of its own. In tensors
it is filled up with its first value, which changes neither its range nor, as it is cut off again, anything else.

Codes of b bits are 0 .. 2^b - 1; those of ``TERNARY`` bits, log2 3 rounded, are 0, 1, 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebench.kernels.formats import GroupQuantised
from sparsebench.kernels.stored import Stored
from sparsebench.methods.weights.adapters import Adapter

TERNARY = 1.58  # bits, in name; five codes take a byte, so 1.6 are stored
_NEAR_ZERO = 0.7  # of the mean of |w|: three levels take their scale from what is larger
_SMALLEST = 2.0**-24  # of float16 above zero
_FURTHEST = 2.0**15  # of a zero point, in steps: float16 ends at 65504


def count_of(columns: int, group: int) -> int:
    """Groups of a row."""
    return -(-columns // group)


def means(scores: Tensor, group: int) -> Tensor:
    """scores (out, in) -> the mean over each group: (out, n)."""
    rows, columns = scores.shape
    padded = F.pad(scores, (0, count_of(columns, group) * group - columns)).view(rows, -1, group)
    sizes = F.pad(torch.ones(columns, device=scores.device), (0, padded[0].numel() - columns)).view(-1, group).sum(1)
    return padded.sum(dim=2) / sizes


def spread(kept: Tensor, group: int, columns: int) -> Tensor:
    """A mask of groups (out, n) as one of entries: (out, in)."""
    return kept.repeat_interleave(group, dim=1)[:, :columns]


def gather(mask: Tensor, group: int) -> Tensor:
    """A mask of entries (out, in) as one of groups: (out, n)."""
    return mask[:, ::group]


def cut(weight: Tensor, group: int) -> Tensor:
    """weight (out, in) -> its groups (out, n, G) in float32, a shorter last one filled with its first value."""
    rows, columns = weight.shape
    missing = count_of(columns, group) * group - columns
    values = weight.float()
    if missing:
        first = (columns // group) * group
        values = torch.cat([values, values[:, first : first + 1].expand(rows, missing)], dim=1)
    return values.view(rows, -1, group)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``value``."""
    return rounded.detach() + (value - value.detach())  # the second term is exactly 0


def storable(value: Tensor, bits: int) -> Tensor:
    """``value`` as it is stored in 16 or 32 bits, in float32, with the gradient of ``value``."""
    return value if bits == 32 else straight_through(value, value.half().float())


def highest(bits: float) -> int:
    """The greatest code."""
    return 2 if bits == TERNARY else int(2**bits) - 1


def group_bits(group: int, bits: float, scale_bits: int, zero_bits: int) -> int:
    """What a group of so many codes takes with its scale and zero point."""
    codes = -(-group * 8 // 5) if bits == TERNARY else group * int(bits)
    return codes + scale_bits + zero_bits


def grid(groups: Tensor, bits: float, include_zero: bool = False, scale_bits: int = 32) -> tuple[Tensor, Tensor]:
    """The asymmetric grid of each group's least and greatest value: groups (k, G) -> scale, zero (k, 1).

    scale = (max - min) / (2^bits - 1), zero = round(-min / scale); a constant group c has scale |c| (1 if c = 0)
    and is exact, in 16 bits up to float16. The zero point is whole and may lie outside 0 .. 2^bits - 1. A group that
    is narrower than 2^-15 of its values gets a wider grid, so that its zero point can be stored.
    """
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    constant = low == high
    if include_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    most = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / highest(bits), most / _FURTHEST)
    scale = torch.where(constant, torch.where(most == 0, 1.0, most), scale)
    scale = storable(scale.clamp(min=_SMALLEST), scale_bits)
    zero = torch.where(constant, (low < 0).float(), torch.round(-low / scale))
    return scale, storable(zero, scale_bits)


def centred(weight: Tensor, group: int, bits: float, scale_bits: int = 32) -> tuple[Tensor, Tensor]:
    """The symmetric grid of each group of weight (out, in): scale, zero (out, n). The zero point is the same
    everywhere, so it is not stored.

        b >= 2   scale = max |w| / m, zero = m = 2^(b-1) - 1: the levels are -m .. m steps
        TERNARY  -a, 0, a with a the mean of |w| where |w| > 0.7 mean |w| (Li, Zhang, Liu 2016, arXiv 1605.04711)
        b = 1    -a, a with a the mean of |w| (Rastegari et al. 2016, arXiv 1603.05279): scale = 2a, zero = 1/2
    """
    size = weight.detach().float().abs()
    if bits >= 2:
        middle = float(highest(bits) // 2)
        scale = cut(size, group).amax(dim=2) / middle
    elif bits == TERNARY:
        middle = 1.0
        far = (size > _NEAR_ZERO * spread(means(size, group), group, size.shape[1])).float()
        scale = means(size * far, group) / means(far, group).clamp(min=_SMALLEST)
    else:
        middle = 0.5
        scale = 2 * means(size, group)
    return storable(scale.clamp(min=_SMALLEST), scale_bits), torch.full_like(scale, middle)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, bits: float) -> Tensor:
    """The codes of groups (k, G), 0 .. ``highest`` in float32; gradients pass the rounding, inside the range."""
    if bits == 1:  # two levels, half a step on either side of 0
        return (groups >= 0).float()
    steps = groups / scale
    return torch.clamp(straight_through(steps, steps.round()) + zero, 0, highest(bits))


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """scale * (codes - zero): (k, G)."""
    return scale * (codes - zero)


class Grouped(Adapter):
    """A weight through its kept groups: ``values`` (k, G) on grids ``scale``, ``zero`` (k, 1), all trainable.

    What was removed is no parameter, so nothing can move it. ``freeze`` turns the values into whole ``codes``
    (k, G) uint8, once and for all; then only scale and zero are left to train, the zero no longer whole. With 16
    bits there is no grid and nothing to freeze. ``kept``: (out, n) bool; weight: (out, in). ``symmetric``: on the
    grids of ``centred``, whose zero is not for training."""

    def __init__(
        self, weight: Tensor, kept: Tensor, group: int, bits: float, include_zero: bool = False, scale_bits: int = 16,
        symmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kept, self.shape, self.group = kept, tuple(weight.shape), group
        self.bits, self.scale_bits, self.itemsize = bits, scale_bits, weight.element_size()
        self.symmetric = symmetric
        chosen = cut(weight.detach(), group)[kept]
        self.values: nn.Parameter | None = nn.Parameter(chosen)
        self.codes: Tensor | None = None
        scale, zero = torch.empty(0), torch.empty(0)
        if symmetric and bits < 16:
            scale, zero = (part[kept][:, None] for part in centred(weight, group, bits, scale_bits))
        elif bits < 16:
            scale, zero = grid(chosen, bits, include_zero, scale_bits)
        self.scale, self.zero = nn.Parameter(scale), nn.Parameter(zero)

    def grids(self) -> tuple[Tensor, Tensor]:
        """Scale and zero as they are stored, with gradients."""
        scale = storable(self.scale.clamp(min=_SMALLEST), self.scale_bits)
        whole = self.codes is None and not self.symmetric
        zero = straight_through(self.zero, self.zero.round()) if whole else self.zero
        return scale, storable(zero, self.scale_bits)

    def forward(self, tensor: Tensor) -> Tensor:
        """The dense weight (out, in) in float32; ``tensor`` is what it stands in for."""
        rows, columns = self.shape
        groups = torch.zeros(self.kept.numel(), self.group, device=self.kept.device)
        where = self.kept.flatten().nonzero().flatten()
        return groups.index_copy(0, where, self._chosen()).view(rows, -1)[:, :columns]

    def _chosen(self) -> Tensor:
        if self.values is not None and self.bits == 16:
            return self.values
        scale, zero = self.grids()
        if self.values is not None:
            return decode(encode(self.values, scale, zero, self.bits), scale, zero)
        return decode(self.codes.float(), scale, zero)  # type: ignore[union-attr]

    @torch.no_grad()
    def freeze(self) -> None:
        """Rounds for good what is trained so far."""
        if self.values is None or self.bits == 16:
            return
        scale, zero = self.grids()
        self.codes = encode(self.values, scale, zero, self.bits).to(torch.uint8)
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self.values = None

    @torch.no_grad()
    def stored(self) -> Stored:
        """What the layer takes in block-sparse rows, and the 4-bit form that a kernel can run, where it fits."""
        rows, columns = self.shape
        count, kept = self.kept.shape[1], int(self.kept.sum())
        value = self.bits if self.bits < 16 else 8 * self.itemsize
        overhead = (self.scale_bits, self.zero_bits) if self.bits < 16 else (0, 0)
        per_group = group_bits(self.group, value, *overhead)
        indexed = kept < self.kept.numel()  # with every group kept there is nothing to index
        bits = kept * (per_group + indexed * index_bits(count)) + indexed * 32 * (rows + 1)
        entries = int(spread(self.kept, self.group, columns).sum())
        return Stored(entries, bits, f"{value:g}-bit groups", self.matrix())

    @property
    def zero_bits(self) -> int:
        """Bits of a stored zero point: those of a code where all are whole and within the codes; none on a symmetric
        grid."""
        if self.symmetric:
            return 0
        zero = self.grids()[1].detach()
        fits = bool(((zero == zero.round()) & (zero >= 0) & (zero <= highest(self.bits))).all())
        return int(self.bits) if fits else self.scale_bits

    def matrix(self) -> GroupQuantised | None:
        """The layer in the kernels' 4-bit format (CPU), exactly as it is; None where that format does not hold it."""
        rows, columns = self.shape
        if self.codes is None or self.bits != 4 or self.scale_bits != 16 or columns % self.group or self.group % 2:
            return None
        scale, zero = (part.detach().flatten().half().cpu() for part in self.grids())
        kept, codes = self.kept.cpu(), self.codes.cpu()
        row_ptr = torch.zeros(rows + 1, dtype=torch.int32)
        row_ptr[1:] = kept.sum(1).cumsum(0)
        place = torch.int16 if index_bits(kept.shape[1]) == 16 else torch.int32
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return GroupQuantised(rows, columns, self.group, row_ptr, kept.nonzero()[:, 1].to(place), packed, scale, zero)


def index_bits(groups: int) -> int:
    """Bits of a group's place in its row of so many groups."""
    return 16 if groups <= 2**15 else 32


@dataclass(frozen=True)
class Load:
    """Kept groups of the busiest worker if workers take rows, and if they take groups; and of all on average."""

    rows: float
    tasks: float
    mean: float

    @classmethod
    def of(cls, kept: Tensor, workers: int) -> Load:
        """kept: (out, n) bool. Row-centric: each worker has a slab of neighbouring rows, as equal as can be.
        Task-centric: the list of kept groups is cut into equal chunks, and rows that two share are added afterwards."""
        per_row = kept.sum(dim=1).cpu()
        slab = torch.arange(len(per_row)) * workers // len(per_row)
        busiest = torch.zeros(workers, dtype=per_row.dtype).index_add(0, slab, per_row).max()
        total = int(per_row.sum())
        return cls(float(busiest), float(ceil(total / workers)), total / workers)
