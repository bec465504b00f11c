"""The Hessian of a layer's squared output error, and the factor that SparseGPT's sweep needs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebench.errors import UserError

_PANEL = 256  # columns of a product at a time: of a symmetric matrix only what is on and below the diagonal is needed
_BASE = 64  # size of a triangular matrix that is inverted at once
_DAMPINGS = (1.0, 5.0, 10.0, 100.0)  # factors tried on percdamp when the matrix is not positive definite


class Hessian:
    """H = (2 / sequences) * sum over calibration tokens of x x^T: (in, in) float32.

    The factor is made once and kept: layers that share their input (q, k, v; gate, up) share it.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.value: Tensor = torch.zeros(())
        self.damping_used: float | None = None
        self._factor: tuple[float, Tensor] | None = None

    def add(self, inputs: Tensor, sequences: int) -> None:
        features = inputs.shape[-1]
        x = inputs.reshape(-1, features).float()
        if self.sequences == 0:
            self.value = torch.zeros(features, features, device=x.device)
        self.value = self.value * (self.sequences / (self.sequences + sequences))
        self.sequences += sequences
        self.value = self.value + _gram(x * (2 / self.sequences) ** 0.5)

    @property
    def dead(self) -> Tensor:
        """Features that no calibration token had: (in,) bool."""
        return self.value.diag() == 0

    def factor(self, percdamp: float, method: str = "sparsegpt") -> Tensor:
        """U, the upper Cholesky factor of the damped inverse: (in, in), H^-1 = U^T U.

        A matrix that is not positive definite is damped more (5, 10, 100 times), recorded in
        ``damping_used``; UserError, naming ``method``, when even that does not help, or when an input was not finite.
        """
        if self._factor is not None and self._factor[0] == percdamp:
            return self._factor[1]
        if not _finite(self.value):
            raise UserError(f"method={method}: calibration gave a layer inputs that are not finite (try dtype=float32)")
        hessian = self.value.clone()
        dead = self.dead
        hessian[dead, dead] = 1
        mean = hessian.diag().mean()
        for more in _DAMPINGS:
            damped = hessian.clone()
            damped.diagonal().add_(percdamp * more * mean)
            # from the last feature to the first: H = V V^T with V upper, so U = V^-1, and H^-1 itself is never needed
            lower, wrong = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(wrong) == 0 and _finite(lower):
                upper = _inverse(lower.flip(0, 1))
                if _finite(upper):
                    self.damping_used = percdamp * more
                    self._factor = (percdamp, upper)
                    return self._factor[1]
        raise UserError(
            f"method.{method}.percdamp={percdamp:g}: the Hessian of a layer is not positive definite even with "
            f"{_DAMPINGS[-1]:g} times that damping; use more calibration data"
        )


def _gram(x: Tensor) -> Tensor:
    """x (tokens, in) -> x^T x (in, in), each pair of features multiplied once."""
    features = x.shape[1]
    product = x.new_empty(features, features)
    for start in range(0, features, _PANEL):
        end = min(start + _PANEL, features)
        torch.matmul(x[:, start:].t(), x[:, start:end], out=product[start:, start:end])
        product[start:end, end:] = product[end:, start:end].t()
    return product


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix (n, n), in halves: mostly products, which are several times faster
    than a solver."""
    n = len(upper)
    if n <= _BASE:
        solved: Tensor = torch.linalg.solve_triangular(upper, torch.eye(n, device=upper.device), upper=True)
        return solved
    half = n // 2
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = first = _inverse(upper[:half, :half])
    inverse[half:, half:] = second = _inverse(upper[half:, half:])
    inverse[:half, half:] = first @ upper[:half, half:] @ second
    inverse[:half, half:].neg_()
    return inverse


def _finite(matrix: Tensor) -> bool:
    """Whether all entries are; several times faster than looking at each."""
    return all(bool(torch.isfinite(one)) for one in matrix.aminmax())
