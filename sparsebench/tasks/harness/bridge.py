"""The harness's model interface over a loaded model: every likelihood is a context, then a continuation.

All of a context but its last token is run first and fills a KV cache; the last token, which predicts
the first scored one, and the continuation are then run through that cache. So a method that compresses
the cache or thins the prefill acts on what is scored, also where the answer is a single token. For a
dense model the result is that of one full forward.

No row is ever padded: rows of one forward have the same number of tokens, and continuations of one
context share its prefill. Padding would be visible to methods that count, evict or gate tokens, and
the batch size must not change a result. Rows of a cache are taken with ``batch_select_indices``; a
cache layer of a method's own that does not define it is run one context at a time, on deep copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparsebench.errors import UserError
from sparsebench.models import caching

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsebench.models.base import LoadedModel
    from sparsebench.tasks.base import Evaluation

_MAX_NEW_TOKENS = 256  # the harness's own default
Answer = tuple[float, bool]  # summed log probability in nats, whether greedy decoding gives it
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class _Continuation:
    """What follows a prefix: the context's last token, then the tokens that are scored."""

    request: int
    tokens: tuple[int, ...]


class CachedLM(TemplateLM):  # type: ignore[misc]
    """A loaded model as the harness sees it.

    ``add_bos``: whether texts begin with the tokenizer's BOS token; None leaves it to the tokenizer,
    as the harness does.
    """

    def __init__(self, loaded: LoadedModel, how: Evaluation, add_bos: bool | None = None) -> None:
        super().__init__()
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.max_length = loaded.context
        self._device = loaded.device
        self._how = how
        self._add_bos = add_bos
        self._rows_selectable = False  # until a cache was seen
        self._keep_one = caching.last_only(loaded.model)
        self._done = self._total = 0

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of ``string``; special tokens by the tokenizer's rule unless said otherwise."""
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False  # the text brings its own
        asked = {} if special is None else {"add_special_tokens": special}
        tokens: list[int] = self.tokenizer.encode(string, **asked)
        bos = self.tokenizer.bos_token_id
        if special and add_special_tokens is None and bos is not None and tokens[:1] != [bos]:
            return [bos, *tokens]  # tokenizers without a template add none, whatever they are told
        return tokens

    # ------------------------------------------------------------------ likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """Log probability (nats) of each request's continuation given its context, and its greediness."""
        self._total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log probability (nats) of each whole text, in disjoint windows of the model's context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            mine = [(None, *make_disjoint_window(window)) for window in found]
            windows += mine
            counts.append(len(mine))
        self._total += len(windows)
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[Answer]:
        """``requests``: (ignored, context tokens, continuation tokens). Contexts are cut from the left."""
        continuations: dict[Prefix, list[_Continuation]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            prefix, rest = self._split(context, continuation)
            continuations.setdefault(prefix, []).append(_Continuation(index, rest))
        answers: dict[int, Answer] = {}
        for batch in self._batches(continuations):
            scored = self._score(batch, [continuations[prefix] for prefix in batch])
            answers |= scored
            self._advance(len(scored))
        return [answers[index] for index in range(len(requests))]

    def _split(self, context: list[int], continuation: list[int]) -> tuple[Prefix, tuple[int, ...]]:
        """(all of the context but its last token, the rest), within the model's context."""
        if not continuation:
            raise ValueError("lm_eval: a request has no tokens to score")
        # the last scored token is never fed, so one more than the context fits
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"task.tasks: an answer has {len(continuation)} tokens, the model's context only {self.max_length}"
            )
        kept = context[-room:]
        return tuple(kept[:-1]), (kept[-1], *continuation)

    def _batches(self, prefixes: Iterable[Prefix]) -> Iterator[list[Prefix]]:
        """Prefixes of equal length, the longest first: memory runs out at once or never."""
        for _, same in groupby(sorted(prefixes, key=len, reverse=True), key=len):
            group, start = list(same), 0
            while start < len(group):
                batch = group[start : start + self._rows]
                yield batch
                start += len(batch)

    @property
    def _rows(self) -> int:
        return self._how.batch_size if self._rows_selectable else 1

    def _score(self, batch: list[Prefix], continuations: list[list[_Continuation]]) -> dict[int, Answer]:
        """Request index -> answer for each of ``continuations[row]`` after prefix ``batch[row]``."""
        cache = self._prefill(batch)
        rows = [(row, one) for row, found in enumerate(continuations) for one in found]
        limit = self._how.batch_size if cache is None else self._rows
        answers: dict[int, Answer] = {}
        for _, same in groupby(sorted(rows, key=_length), key=_length):
            group = list(same)
            for start in range(0, len(group), limit):
                chunk = group[start : start + limit]
                tokens = self._tensor([one.tokens for _, one in chunk])
                logits = self._continue(cache, [row for row, _ in chunk], tokens[:, :-1])
                for (_, one), answer in zip(chunk, _answers(logits, tokens[:, 1:]), strict=True):
                    answers[one.request] = answer
        return answers

    def _prefill(self, batch: list[Prefix]) -> Any:
        """The cache after the prefixes, one row each; None for the empty prefix."""
        if not batch[0]:
            return None
        _, cache = caching.read(self.model, self._tensor(batch), **self._keep_one)
        self._rows_selectable = _rows_selectable(cache)
        return cache

    def _continue(self, cache: Any, rows: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """float32 logits (rows, tokens, vocabulary) of ``tokens`` (rows, tokens) after the cache's ``rows``."""
        if cache is None:
            return self.model(input_ids=tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]
        past = copy.deepcopy(cache)  # a forward appends to its cache, and other continuations still need it
        if self._rows_selectable:
            past.batch_select_indices(torch.tensor(rows, device=self._device))
        return caching.read(self.model, tokens, past)[0].float()

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._device)

    def _advance(self, count: int) -> None:
        self._done += count
        self._how.progress(self._done, self._total)

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each context, up to a stop sequence. UserError when sampling is asked for."""
        self._total += len(requests)
        waiting = []
        for index, request in enumerate(requests):
            text, asked = request.args
            options = normalize_gen_kwargs(dict(asked), _MAX_NEW_TOKENS)
            if options.get("do_sample") or options.get("num_beams", 1) != 1:
                raise UserError(f"task.tasks={request.task_name}: only greedy generation is supported")
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"task.tasks={request.task_name}: generates up to {options['max_gen_toks']} tokens, "
                    f"the model's context has {self.max_length}"
                )
            tokens = self.tok_encode(text)[-room:] or [self.prefix_token_id]
            until = handle_stop_sequences(options.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
            waiting.append((len(tokens), options["max_gen_toks"], tuple(until), index, tokens))
        texts: dict[int, str] = {}
        for (_, new, until), same in groupby(sorted(waiting, reverse=True), key=lambda item: item[:3]):
            group = list(same)
            for start in range(0, len(group), self._how.batch_size):
                chunk = group[start : start + self._how.batch_size]
                found = self._generate([item[-1] for item in chunk], new, list(until))
                texts |= {item[3]: text for item, text in zip(chunk, found, strict=True)}
                self._advance(len(chunk))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[list[int]], new: int, until: list[str]) -> list[str]:
        """The texts after ``prompts`` (of equal length), at most ``new`` tokens, without the stop sequence."""
        tokens = self._tensor(prompts)
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, tokens.shape[1], len(prompts)),
        )
        decoded = (self.tokenizer.decode(row, skip_special_tokens=True) for row in output[:, tokens.shape[1] :])
        return [postprocess_generated_text(text, stop=until, think_end_token=None) for text in decoded]


def _length(item: tuple[int, _Continuation]) -> int:
    return len(item[1].tokens)


def _answers(logits: torch.Tensor, targets: torch.Tensor) -> list[Answer]:
    """``logits``: (rows, scored, vocabulary), ``targets``: (rows, scored)."""
    chosen = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0].sum(-1)
    greedy = (logits.argmax(-1) == targets).all(-1)
    return list(zip(chosen.tolist(), greedy.tolist(), strict=True))


def _rows_selectable(cache: Any) -> bool:
    """Whether every layer's class selects rows itself: a subclass that inherits the selection may hold
    further tensors by row, which would silently stay behind."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = getattr(cache, "layers", None) or [None]
    return all(type(layer) in known or "batch_select_indices" in vars(type(layer)) for layer in layers)
