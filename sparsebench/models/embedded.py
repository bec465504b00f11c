"""The embedded models: the tiny ladder that comes with the package, always run in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsebench.declare import Declared, model, option
from sparsebench.errors import UserError
from sparsebench.models.content import weights_content

if TYPE_CHECKING:  # imports torch
    from sparsebench.models.base import LoadedModel
    from sparsebench.models.loading import How

HOME = Path(__file__).parent / "weights"


@model(name="ladder", version=1, calibration="kjv")
@dataclass(frozen=True)
class Ladder(Declared):
    """The tiny ladder: Llama models of 0.1M to 4M parameters, trained on kjv and tinyworld."""

    rung: str = option("tiny_1m", "which model of the ladder", choices=("tiny_100k", "tiny_400k", "tiny_1m", "tiny_4m"))
    outliers: bool = option(False, "give the model outlier features without changing its function")
    outliers_sigma: float = option(
        1.0, "spread of the outlier scales: log scale ~ N(0, sigma)", low=0.0, high=4.0, only="outliers=true"
    )
    device: str = option("auto", "cpu, cuda, cuda:N or mps; auto: cuda where there is one, else cpu")

    def content(self) -> str:
        """sha256 of the rung's files. UserError when this installation lacks them."""
        return weights_content(self._folder(), f"model.rung={self.rung}")

    def load(self) -> LoadedModel:
        """The rung in float32 (the files are bfloat16), on its device, ready to evaluate."""
        from sparsebench.models.loading import load_folder

        return load_folder(*self.source())

    def source(self) -> tuple[Path, How]:
        """Its folder, and how it is loaded."""
        from sparsebench.models.loading import How

        how = How(
            named=f"model.rung={self.rung}",
            name=self.rung,
            dtype="float32",
            device=self.device,
            outliers_sigma=self.outliers_sigma if self.outliers else None,
        )
        return self._folder(), how

    def _folder(self) -> Path:
        folder = HOME / self.rung
        if not folder.is_dir():
            raise UserError(
                f"model.rung={self.rung}: its weights are not in this installation ({folder}); install again"
            )
        return folder
