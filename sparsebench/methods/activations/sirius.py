"""Sirius: contextual sparsity with correction (Zhou et al. 2024, arXiv 2409.03856).

A sparse model drafts tokens; every ``period`` tokens the full model reads the chunk, replaces its keys and values,
accepts a prefix and adds a token of its own (the loop is in ``drafting``). The prompt is read by the full model.
Drafts skip MLP neurons: ``kind=griffin`` (the paper's CSparse) keeps the int(keep I) neurons of

    Z = act(gate) * up over the prompt;  stat_j = || Z_:j / ||Z_t||_2 ||_2 over its tokens t

for a whole text, ``kind=cats`` (FSparse) those of each token with the largest |act(gate)|, the gate projection
staying dense, ``kind=cats_threshold`` those above a fixed threshold per layer, from the file that ``save=`` wrote for
``method=cats``. ``sparsity`` is 1 - keep, of MLP neurons in drafts. Texts are decoded greedily, one at a time, in place
of the model's own ``generate``: the task must generate. ``correct=false`` is the sparse model alone.
Costs, in full passes per token (memory-bound, a pass over all beams counting once): ``effective_density`` =
((P - 1) density + 1) / AAL, the paper's published rows to rounding, where ``density_draft`` counts every parameter of
the model and ``advance`` (AAL) the tokens per correction; ``passes_per_token`` is counted, last chunks included.
``density_linear`` is counted likewise over the blocks' linear layers; FLOPs count beams and chunks in full. The tree
of the release (Infini-AI-Lab/Sirius) is run here as a batch of beams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebench.costs.saving import Saving
from sparsebench.declare import Taxonomy, method, option
from sparsebench.errors import UserError
from sparsebench.methods.activations import saved
from sparsebench.methods.activations.base import ActivationMethod
from sparsebench.methods.activations.cats import ThresholdGate
from sparsebench.methods.activations.drafting import Counts, Decoder, Settings
from sparsebench.methods.activations.gating import Acting, Gate, Gating, density_linear, only, top_k
from sparsebench.methods.activations.sites import GatedBlock
from sparsebench.methods.base import Counted


class NeuronGate(Gate):
    """Keeps one set of MLP neurons for a whole text: rows of gate and up, columns of down."""

    def __init__(self, block: GatedBlock, keep: int) -> None:
        super().__init__(block, "down")
        self.unneeded = [block.linears["gate"], block.linears["up"]]
        self.keep = keep
        self.chosen: Tensor | None = None

    def take(self) -> Tensor | None:
        return self.chosen if self.acts else None

    def look(self, hidden: Tensor) -> None:
        """Chooses the neurons from a prompt's activations: (1, tokens, neurons)."""
        self.chosen = top_k(neuron_statistic(hidden[0]), self.keep)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.chosen is None:
            raise RuntimeError("the prompt was not read")
        keep = self.chosen.expand(x.shape)
        return only(keep, x), keep


class BeamGate(Gate):
    """Drops the ``drop`` smallest |activations| of each token; of all beams together if ``shared``."""

    def __init__(self, block: GatedBlock, drop: int, shared: bool) -> None:
        super().__init__(block, None)
        self.keep, self.shared = block.hidden - drop, shared

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = x.abs().sum(dim=0, keepdim=True) if self.shared else x.abs()
        keep = top_k(score, self.keep).expand(x.shape)
        return only(keep, x), keep


def neuron_statistic(hidden: Tensor) -> Tensor:
    """stat_j of the neurons. hidden: (tokens, neurons) -> (neurons,)."""
    found: Tensor = nn.functional.normalize(hidden.float(), dim=-1).norm(dim=0)
    return found


@dataclass
class Drafting(Gating):
    """Sirius on its model: inside ``attached()`` the model's ``generate`` drafts and corrects."""

    settings: Settings | None = None
    counts: Counts | None = None

    def decoder(self) -> Decoder:
        """What drafts and corrects, counting anew."""
        if self.settings is None:
            raise ValueError("no settings")
        acting = self.acting = Acting(self.sparse, self.watched)
        decoder = Decoder(self.model, self.settings, lambda: acting.on(self.model, self.gates), self._prompted)
        self.counts = decoder.counts
        return decoder

    @contextmanager
    def attached(self) -> Iterator[None]:
        decoder = self.decoder()
        model: Any = self.model
        model.generate = lambda input_ids, **how: generate(decoder, input_ids, how)
        try:
            yield
        finally:
            del model.generate

    @contextmanager
    def _prompted(self) -> Iterator[None]:
        """Inside, the neurons of the text are chosen from what the full model makes of its prompt."""

        def look(gate: NeuronGate) -> Any:
            return gate.module.register_forward_pre_hook(lambda module, args: gate.look(args[0]))

        handles = [look(gate) for gate in self.gates if isinstance(gate, NeuronGate)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def counted(self) -> Counted:
        """Drafted tokens are what was acted on; shares and densities are per emitted token, corrections included."""
        drafts = super().counted()
        counts = self.counts
        if counts is None or self.settings is None or not drafts.acted or not counts.tokens:
            return Counted(acted=False, achieved=0.0, rows=drafts.rows, warnings=self.warnings)
        shares = {name: share for name, (_, share) in drafts.saving.linear.items()}
        steps, full = counts.draft_steps / counts.tokens, counts.corrections / counts.tokens
        sizes = {name: module.weight.numel() for name, module in self.model.named_modules() if _linear(module)}
        saving = {name: (1.0, steps * shares.get(name, 1.0) + full) for name in sizes}
        read = sum(size * shares.get(name, 1.0) for name, size in sizes.items())
        rows, verified = counts.draft_rows / counts.tokens, counts.corrected_tokens / counts.tokens
        extra = 2.0 * ((rows - steps) * read + (verified - full) * sum(sizes.values()))
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        dense = 1 - sum(size * (1 - shares.get(name, 1.0)) for name, size in sizes.items()) / parameters
        columns = drafts.columns | self._columns(counts, dense)
        columns["density_linear"] = density_linear(self.blocks, {name: share for name, (_, share) in saving.items()})
        cost = Saving(saving, index_decode=lambda length: extra)
        return Counted(True, drafts.achieved, drafts.rows, columns, cost, drafts.warnings)

    def _columns(self, counts: Counts, density: float) -> dict[str, Any]:
        passes = (counts.draft_steps * density + counts.corrections) / counts.tokens
        found: dict[str, Any] = {"density_draft": density, "passes_per_token": passes, "effective_density": passes}
        found |= {"corrections": counts.corrections, "generated_tokens": counts.tokens + counts.texts}
        if counts.corrections and self.settings is not None:
            full = counts.chunks > 0  # else texts were shorter than a period: all that there is
            advance = counts.advance / counts.chunks if full else counts.all_advance / counts.corrections
            found["advance"] = advance
            if full:
                found["effective_density"] = ((self.settings.period - 1) * density + 1) / advance
        return found


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def generate(decoder: Decoder, input_ids: Tensor, how: Mapping[str, Any]) -> Tensor:
    """What a model's ``generate`` gives: (rows, tokens + new), padded behind the end. ``how``: ``max_new_tokens``;
    all else that callers hand over describes greedy decoding."""
    settings = decoder.model.generation_config
    ends = settings.eos_token_id
    stops = set() if ends is None else set(ends if isinstance(ends, (list, tuple)) else [ends])
    new = int(how["max_new_tokens"])
    found = [decoder.generate(row[None], new, stops) for row in input_ids]
    longest = max(map(len, found))
    filler = settings.pad_token_id if settings.pad_token_id is not None else min(stops, default=0)
    added = [row + [filler] * (longest - len(row)) for row in found]
    return torch.cat([input_ids, torch.tensor(added, device=input_ids.device)], dim=1)


@method(
    name="sirius",
    version=1,
    paper="Zhou et al. 2024, arXiv 2409.03856",
    target="activations",
    phase="decode",
    taxonomy=Taxonomy(
        object="activations",
        granularity=("row", "column"),
        when_mask_is_found="at_inference",
        mask_dynamics="input_dependent",
        benefit_realised_on=("memory",),
        kernel_required="gathered gated MLP",
    ),
)
@dataclass(frozen=True)
class Sirius(ActivationMethod):
    """Drafts with a sparse MLP and lets the full model correct every chunk of tokens."""

    kind: str = option(
        "griffin",
        "neurons of drafts: one set for a text (CSparse), or each token's by count (FSparse) or by fixed thresholds",
        choices=("griffin", "cats", "cats_threshold"),
    )
    thresholds: str | None = option(
        None, "kind=cats_threshold: what save= wrote for method=cats on this model at this sparsity", unit="file"
    )
    period: int = option(16, "tokens of a chunk, the trusted first one included", low=2, high=4096, unit="tokens")
    threshold: float = option(
        0.1, "a drafted token is accepted from this likelihood on; 0 accepts all, above 1 none", low=0.0, high=2.0
    )
    tree_width: int = option(8, "drafts that live at once", low=1, high=256)
    temperature: float = option(0.6, "of the likelihoods in drafts and test; nothing is sampled", above=0.0)
    filter_active: bool = option(False, "a child above 0.95 has no siblings")
    pattern_strict: bool = option(False, "all beams share one set of neurons", only="kind=cats")
    kv_rewrite: bool = option(True, "the full model's keys and values replace the drafts' (false: ablation)")
    correct: bool = option(True, "false: the sparse model alone, the baseline")

    def check_model(self, model: nn.Module, blocks: Sequence[GatedBlock]) -> None:
        given = self.thresholds is not None
        if given != (self.kind == "cats_threshold"):
            other = "needs method.sirius.thresholds=<file>" if not given else "takes no method.sirius.thresholds"
            raise UserError(f"method.sirius.kind={self.kind}: {other}; cats_threshold alone reads one")
        if given:
            self._thresholds(blocks, model)

    def _thresholds(self, blocks: Sequence[GatedBlock], model: nn.Module | None = None) -> list[float]:
        """The threshold of each block. UserError for a file of anything else, or of another model than this one."""
        where, file = "method.sirius.thresholds", str(self.thresholds)
        found = saved.read(where, file, model, self.level)
        saved.require(where, file, found, {f"{block.name}.threshold": () for block in blocks})
        if len(found) > len(blocks):
            raise UserError(f"{where}={file}: holds more than thresholds; save method=cats without finetune_steps")
        return [float(found[f"{block.name}.threshold"]) for block in blocks]

    def tolerance(self, blocks: Sequence[GatedBlock]) -> float:
        return 0.03 if self.kind == "cats_threshold" else max(1 / block.hidden for block in blocks)

    def gates(self, blocks: Sequence[GatedBlock], tensors: Mapping[str, Tensor]) -> list[Gate]:
        if self.kind == "cats":
            return [BeamGate(block, int(self.level * block.hidden), self.pattern_strict) for block in blocks]
        if self.kind == "cats_threshold":
            return [ThresholdGate(block, cut) for block, cut in zip(blocks, self._thresholds(blocks), strict=True)]
        return [NeuronGate(block, max(1, int(round(1 - self.level, 12) * block.hidden))) for block in blocks]

    def attachment(
        self, label: str, model: nn.Module, blocks: list[GatedBlock], gates: list[Gate], tensors: dict[str, Tensor]
    ) -> Gating:
        settings = Settings(
            self.period, self.threshold, self.tree_width, self.temperature,
            self.filter_active, self.kv_rewrite, self.correct,
        )  # fmt: skip
        return Drafting(
            label, self.level, self.tolerance(blocks), model, blocks, gates, self.sparse_tokens, settings=settings
        )  # fmt: skip
