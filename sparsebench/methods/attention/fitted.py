"""Methods of sparse prefill attention that learn from calibration data, or read what another run learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsebench.declare import option
from sparsebench.errors import UserError
from sparsebench.methods.attention.base import AttentionMethod
from sparsebench.methods.base import Surroundings, read_tensors


@dataclass(frozen=True)
class FittedMethod(AttentionMethod):
    """Base of methods that learn from calibration data, once."""

    fitted_from: str | None = option(
        None, "a file that save= wrote for this model: nothing is learned then", unit="file"
    )

    @abstractmethod
    def shapes(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that ``learn`` returns."""

    @abstractmethod
    def learn(self, around: Surroundings) -> dict[str, Tensor]:
        """What ``fit`` returns where nothing was loaded."""

    @abstractmethod
    def fault(self, learned: Mapping[str, Tensor], model: PreTrainedModel) -> str | None:
        """What is wrong with the values of finite tensors of these shapes, in words; None if they can be used."""

    def check_model(self, model: PreTrainedModel) -> None:
        if self.fitted_from is not None:
            self.loaded(model)

    def fit(self, around: Surroundings) -> dict[str, Tensor]:
        """What was loaded or is learned now. FloatingPointError when learning ran away."""
        if self.fitted_from is not None:
            return self.loaded(around.loaded.model)
        learned = self.learn(around)
        wild = _not_finite(learned)
        if wild:
            raise FloatingPointError(f"{wild}, as it was learned, is not finite")
        return learned

    def loaded(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the file ``fitted_from`` holds. UserError when that does not fit the model or cannot be used."""
        where = self.name("fitted_from")
        found = read_tensors(where, str(self.fitted_from))
        for name, shape in self.shapes(model).items():
            if name not in found or tuple(found[name].shape) != shape:
                has = tuple(found[name].shape) if name in found else "not there"
                raise UserError(f"{where}: {name} is {has}; for this model and these options it must be {shape}")
        wild = _not_finite(found)
        wrong = f"{wild} is not finite" if wild else self.fault(found, model)
        if wrong:
            raise UserError(f"{where}: {wrong}")
        return found


def _not_finite(learned: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or an infinity, or None."""
    return next((name for name, one in learned.items() if not bool(torch.isfinite(one).all())), None)
