"""WINA: weight informed neuron activation (Chen et al. 2025, arXiv 2505.19427).

    keep the K = int(in (1 - s)) channels of each token with the largest |x_j| * ||W_:j||_2

Where the columns of W are orthogonal this leaves the smallest output error that K channels can. Two deviations of
the release (microsoft/wina) from the paper are options: it uses the norm for k and gate alone
(``norm_on=code``; ``all`` is the paper's form, ``none`` plain magnitude, which with the transform is the
paper's baseline TEAL-transform), and it takes the embeddings' means off (``center_embeddings``, off here because it
changes an RMSNorm model). ``transform``: the rotations that make columns orthogonal (see ``rotation``); the two
products per block that they add are counted as FLOPs. All but the first 1% of a prompt's tokens are gated.
Sparsity and achieved weigh each projection by its weights and count acted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.activations.base import Frame
from sparsebench.methods.activations.quantiles import Distribution, exact
from sparsebench.methods.activations.rotation import Rotation, check_rotatable
from sparsebench.methods.activations.scored import ScoredInputs
from sparsebench.methods.activations.sites import SITE_OF, BlockSeen, GatedBlock, Linear

_NORM_ON = {"code": ("k", "gate"), "all": tuple(SITE_OF), "none": ()}


@method(
    name="wina",
    version=1,
    paper="Chen et al. 2025, arXiv 2505.19427",
    target="activations",
    phase="prefill",
    uses=("calibration", "seed"),
    baseline="teal",
    taxonomy=Taxonomy(
        object="activations",
        granularity=("unstructured", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        data_need="calibration",
        benefit_realised_on=("memory", "flops"),
        kernel_required="gathered matrix-vector product",
    ),
)
@dataclass(frozen=True)
class Wina(ScoredInputs):
    """Drops the input channels with the smallest |activation| x norm of the weight column."""

    sparse_tail: float = option(
        0.99, "share of a prompt's tokens, at its end, that are acted on; decoded tokens always are", low=0.0, high=1.0
    )
    windows: int | None = option(20, "calibration sequences that are used: the first so many; all if null", low=1)
    mask_by: str = option(
        "topk", "keep what exceeds a fitted threshold, or the largest of each token", choices=("threshold", "topk")
    )
    base_step: float = option(
        0.025, "sparsity that a projection of q's size gains in a step", above=0.0, high=1.0, only="allocation=greedy"
    )
    norm_on: str = option(
        "code", "projections whose score has the column norm: k and gate, all, none", choices=("code", "all", "none")
    )
    transform: bool = option(True, "rotate the residual stream so that the columns of k and gate are orthogonal")
    center_embeddings: bool = option(
        False, "take each embedding's mean off first, as the release does", only="transform=true"
    )

    def scale(self, linear: Linear) -> Tensor | None:
        return linear.module.weight.detach().norm(dim=0) if linear.kind in _NORM_ON[self.norm_on] else None

    def distributions(self, seen: BlockSeen, kinds: Sequence[str]) -> dict[str, Distribution]:
        found, plain = {}, {}
        for kind in kinds:
            site = SITE_OF[kind]
            scale = self.scale(seen.block.linears[kind])
            if scale is not None:
                found[kind] = exact(seen.values[site].abs() * scale)
                continue
            if site not in plain:
                plain[site] = exact(seen.values[site].abs())
            found[kind] = plain[site]
        return found

    def threshold(self, distribution: Distribution, level: float) -> float:
        return distribution.quantile(level)

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        super().check_model(model, blocks)
        if self.transform:
            check_rotatable(model, list(blocks))

    def frame(self, model: nn.Module) -> Frame:
        return Rotation(model, self.center_embeddings).applied if self.transform else super().frame(model)

    def index(self, blocks: Sequence[GatedBlock]) -> float:
        hidden = blocks[0].linears["q"].module.in_features
        return 2.0 * hidden * hidden * (2 * len(blocks) - 1) if self.transform else 0.0
