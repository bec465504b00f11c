"""Tasks of the evaluation harness by other metrics than accuracy: f1, rouge, string match, a task's own score.

``task=longbench`` (Bai et al. 2023, arXiv 2308.14508) and ``task=ruler`` (Hsieh et al. 2024, arXiv 2404.06654) are
such: the harness's own task files, which need their data sets (a network or a local cache) and, for LongBench, the
packages jieba, fuzzywuzzy and rouge. LongBench's prompts are cut from the left where they are longer than the model's
context; its authors cut out the middle.

``score`` is the mean over the asked tasks of each one's metric; ``<metric>/<task>`` stands beside it. A metric that is
no mean over documents (a corpus's BLEU) has no standard error and no outcomes to pair. RULER's tasks make prompts of
``length`` tokens with the model's tokenizer and call the score by that length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsebench.declare import option, task
from sparsebench.errors import UserError
from sparsebench.tasks.lm_eval import LmEval, shared_metrics

if TYPE_CHECKING:
    from sparsebench.models.base import LoadedModel


@task(name="lm_eval_score", version=1, metric="score", better="higher", gives=("prefill", "decode"))
@dataclass(frozen=True)
class LmEvalScore(LmEval):
    """Any metric of tasks of the lm-evaluation-harness of which more is better."""

    metrics: tuple[str, ...] = option(
        ("score", "f1", "exact_match", "acc"), "what is scored: of each task the first of these that it reports"
    )
    length: int | None = option(
        None, "tokens of the prompts of tasks that make them themselves, as RULER's do", low=64, high=1_048_576
    )

    primary: ClassVar[str] = "score"
    outcome: ClassVar[str] = "score"
    beside: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise UserError("task.metrics=[]: name at least one metric, e.g. task.metrics=[f1,exact_match]")

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.metrics if self.length is None else (str(self.length), *self.metrics)

    def check_metrics(self, asked: dict[str, dict[str, Any]]) -> None:
        """UserError when a task reports none of the metrics, or one of which less is better."""
        for name, leaves in asked.items():
            metric = self.metric_of(leaves)
            if metric is None:
                self._check_length(name, shared_metrics(leaves))
                has = ", ".join(sorted(shared_metrics(leaves))) or "no metric that all of its tasks have"
                raise UserError(f"task.metrics=[{','.join(self.wanted)}]: {name} reports {has}")
            if not all(leaf.higher_is_better().get(metric) for leaf in leaves.values()):
                raise UserError(f"task.metrics: {metric} of {name} is not better when it is higher")

    def _check_length(self, name: str, reported: set[str]) -> None:
        """UserError when a task calls its scores by lengths, and the asked one is not among them."""
        lengths = sorted((one for one in reported if one.isdigit()), key=int)
        if lengths:
            asked = "" if self.length is None else f"={self.length}"
            raise UserError(f"task.length{asked}: {name} is scored at a length of {', '.join(lengths)}")

    def metadata(self, model: LoadedModel) -> dict[str, Any]:
        told = super().metadata(model)
        if self.length is None:
            return told
        if self.length > model.context:
            raise UserError(f"task.length={self.length}: the model's context has {model.context} tokens")
        if model.tokenizer.init_kwargs.get("auto_map"):  # the harness would run it
            raise UserError(f"task.length={self.length}: the model's tokenizer brings code of its own, not supported")
        return told | {"max_seq_lengths": [self.length], "tokenizer": model.tokenizer.name_or_path}
