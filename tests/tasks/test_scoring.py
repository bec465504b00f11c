"""Token scores: against log_softmax written out, and the cache against the full forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.models.base import LoadedModel
from sparsebench.tasks.scoring import score_tokens

VOCABULARY = 50


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LoadedModel(LlamaForCausalLM(config).eval(), None, "tiny", 64)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 41), generator=torch.Generator().manual_seed(1))


def direct(loaded: LoadedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's -log p and whether it is the most likely one, a token at a time."""
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits
    nll, hits = torch.zeros(ids.shape[0], ids.shape[1] - 1), torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=bool)
    for row in range(ids.shape[0]):
        for place in range(1, ids.shape[1]):
            scores = logits[row, place - 1].double().log_softmax(-1)
            nll[row, place - 1] = -scores[ids[row, place]]
            hits[row, place - 1] = int(scores.argmax()) == int(ids[row, place])
    return nll, hits


def test_one_forward(loaded: LoadedModel, ids: Tensor) -> None:
    ids = ids.clone()
    with torch.no_grad():  # make some hits: the most likely token after each prefix of row 0
        for place in range(5, 12):
            ids[0, place] = loaded.model(input_ids=ids[:1, :place]).logits[0, -1].argmax()
    nll, hits = score_tokens(loaded, ids)
    wanted, wanted_hits = direct(loaded, ids)
    assert nll.shape == hits.shape == (3, 40) and nll.dtype == torch.float32 and hits.dtype == torch.bool
    torch.testing.assert_close(nll, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, wanted_hits) and hits[0, 4:11].all()
    assert not nll.requires_grad


@pytest.mark.parametrize("prefill", [1, 2, 20, 39, 40])
@pytest.mark.parametrize("step", [0, 1, 7, 100])
def test_through_the_cache_equals_the_full_forward(loaded: LoadedModel, ids: Tensor, step: int, prefill: int) -> None:
    nll, hits = score_tokens(loaded, ids, prefill=prefill, step=step)
    wanted, wanted_hits = score_tokens(loaded, ids)
    assert nll.shape == hits.shape == (3, 41 - prefill)
    torch.testing.assert_close(nll, wanted[:, prefill - 1 :], rtol=0, atol=1e-4)
    assert torch.equal(hits, wanted_hits[:, prefill - 1 :])


@pytest.mark.parametrize(("step", "sizes"), [(0, [20, 20]), (1, [20] + [1] * 20), (7, [20, 7, 7, 6])])
def test_each_forward_sees_only_what_it_should(loaded: LoadedModel, ids: Tensor, step: int, sizes: list[int]) -> None:
    seen: list[tuple[int, bool]] = []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = loaded.model

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Tensor, **more: Any) -> Any:
            seen.append((input_ids.shape[1], more["use_cache"]))
            return self.inner(input_ids=input_ids, **more)

    score_tokens(LoadedModel(Watched(), None, "watched", 64), ids, prefill=20, step=step)  # type: ignore[arg-type]
    assert seen == [(size, True) for size in sizes]  # the last token is scored, never fed


def test_half_precision_is_scored_in_float32() -> None:
    logits = torch.zeros(1, 1, VOCABULARY, dtype=torch.bfloat16)
    logits[0, 0, 3] = 2.0

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(1, 1)

        def get_input_embeddings(self) -> Any:
            return self.embed

        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(logits=logits)

    nll, hits = score_tokens(LoadedModel(Half(), None, "half", 64), torch.tensor([[0, 3]]))  # type: ignore[arg-type]
    assert nll.dtype == torch.float32 and hits.tolist() == [[True]]
    torch.testing.assert_close(nll[0, 0], -logits[0, 0].float().log_softmax(-1)[3])
