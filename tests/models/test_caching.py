"""Caches by whichever name a model's code gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsebench.models import caching
from sparsebench.models.embedded import Ladder


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, use_cache: bool = False, scale: int = 1) -> Any:
        seen = [*(cache or []), *input_ids[0].tolist()]
        return SimpleNamespace(logits=scale * input_ids, cache=seen if use_cache else None)


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = False, scale: int = 1) -> Any:
        seen = [*(past_key_values or []), *input_ids[0].tolist()]
        return SimpleNamespace(logits=scale * input_ids, past_key_values=seen if use_cache else None)


@pytest.mark.parametrize(("model", "name"), [(New(), "cache"), (Old(), "past_key_values")])
def test_a_cache_is_read_and_handed_on_by_its_own_name(model: nn.Module, name: str) -> None:
    assert caching.cache_name(model) == name
    logits, cache = caching.read(model, torch.tensor([[1, 2]]), scale=3)
    assert logits.tolist() == [[3, 6]] and cache == [1, 2]
    assert caching.read(model, torch.tensor([[5]]), cache)[1] == [1, 2, 5]


def test_a_cache_is_found_among_arguments() -> None:
    arguments = {"cache": None, "past_key_values": [1], "use_cache": True}
    assert caching.cache_given(arguments) == [1] and caching.cache_given({"use_cache": True}) is None
    assert caching.without_cache(arguments) == {"use_cache": True}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_reading_piece_by_piece_gives_the_logits_of_the_whole_without_a_word_of_deprecation() -> None:
    model = Ladder(rung="tiny_100k").load().model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        first, cache = caching.read(model, ids[:, :7])
        rest, _ = caching.read(model, ids[:, 7:], cache)
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=1e-4, atol=1e-4)
