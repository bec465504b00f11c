"""TEAL: training-free activation sparsity (Liu et al. 2024, arXiv 2408.14690).

    x <- x * (|x| > t_p)        for the input x of every linear layer p of a block

with t_p = F^-1(0.5 + s_p / 2), F the distribution of the values of that input over calibration data, read off a
histogram of 10,000 bins whose outer two hold 1% each. That takes the values to be symmetric around zero: where they
are not, the realised sparsity differs from s_p, and the record says so. The published evaluations gate the last
half of a prompt's tokens (``sparse_tail=0.5``), and every decoded one. ``allocation=greedy`` shares the block's
sparsity out over its projections (see ``allocation``). Sparsity and achieved weigh each projection by its weights
and count acted tokens. The released code (FasterDecoding/TEAL) is followed; its calibration is 10 windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsebench.declare import Taxonomy, method, option
from sparsebench.methods.activations.allocation import relative_weights
from sparsebench.methods.activations.quantiles import Distribution, histogram
from sparsebench.methods.activations.scored import ScoredInputs
from sparsebench.methods.activations.sites import SITE_OF, BlockSeen, GatedBlock


@method(
    name="teal",
    version=1,
    paper="Liu et al. 2024, arXiv 2408.14690",
    target="activations",
    phase="prefill",
    uses=("calibration", "seed"),
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
class Teal(ScoredInputs):
    """Drops small entries of every linear layer's input by thresholds from activation histograms."""

    sparse_tail: float = option(
        0.5, "share of a prompt's tokens, at its end, that are acted on; decoded tokens always are", low=0.0, high=1.0
    )
    windows: int | None = option(10, "calibration sequences that are used: the first so many; all if null", low=1)
    bins: int = option(10_000, "bins of a site's histogram", low=8, high=1_000_000)
    outlier: float = option(0.01, "share of the values in each of the two outer bins", low=0.0, below=0.5)
    compat_weights: bool = option(
        False,
        "count k and v as 1/8 of q where they are as large, as in the published Llama-2 tables",
        only="allocation=greedy",
    )

    def distributions(self, seen: BlockSeen, kinds: Sequence[str]) -> dict[str, Distribution]:
        sites = {site: histogram(values, self.bins, self.outlier) for site, values in seen.values.items()}
        return {kind: sites[SITE_OF[kind]] for kind in kinds}

    def threshold(self, distribution: Distribution, level: float) -> float:
        return distribution.quantile(0.5 + level / 2)

    def weights(self, block: GatedBlock) -> dict[str, float]:
        return relative_weights(block, self.kinds, self.compat_weights)
