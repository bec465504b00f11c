"""The Hessian of a layer's squared output error, and the factor that SparseGPT's sweep needs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebench.errors import UserError

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
        before, self.sequences = self.sequences, self.sequences + sequences
        x = x * (2 / self.sequences) ** 0.5
        product = x.t() @ x
        self.value = self.value.mul_(before / self.sequences).add_(product) if before else product

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
        if not _finite(self.value.diag()):  # no other entry is larger than both of its diagonal ones
            raise UserError(f"method={method}: calibration gave a layer inputs that are not finite (try dtype=float32)")
        hessian = self.value.clone()
        dead = self.dead
        hessian[dead, dead] = 1
        mean = hessian.diag().mean()
        for more in _DAMPINGS:
            damped = hessian.clone()
            damped.diagonal().add_(percdamp * more * mean)
            lower, wrong = torch.linalg.cholesky_ex(damped)
            if int(wrong) == 0 and _finite(lower.diag()):
                upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if int(wrong) == 0:
                    self.damping_used = percdamp * more
                    self._factor = (percdamp, upper)
                    return self._factor[1]
        raise UserError(
            f"method.{method}.percdamp={percdamp:g}: the Hessian of a layer is not positive definite even with "
            f"{_DAMPINGS[-1]:g} times that damping; use more calibration data"
        )


def _finite(diagonal: Tensor) -> bool:
    return bool(torch.isfinite(diagonal).all())
