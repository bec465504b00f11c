"""The pair-token recall model: what is shipped, and how it is trained."""

from __future__ import annotations

from random import Random

import pytest
import torch

from sparsebench.corpora import recall
from sparsebench.errors import UserError
from sparsebench.models import recall as training
from sparsebench.models.embedded import HOME, Ladder
from sparsebench.models.pair_recall import PairRecall
from sparsebench.trainer import Batch


def test_the_shipped_model_recalls() -> None:
    loaded = PairRecall().load()
    assert training.accuracy(loaded.model, rows=16) > 0.99
    assert loaded.model.dtype == torch.float32 and loaded.context == 128
    assert loaded.tokenizer.get_vocab() == training.tokenizer().get_vocab()
    text = "k07=v03 k01=v00 k07?"
    assert loaded.tokenizer(text)["input_ids"] == [16 * 7 + 3, 16, 1024 + 7]
    assert loaded.tokenizer.decode([16 * 7 + 3, 16, 1024 + 7]) == text
    assert (HOME / "pair_recall" / "model.safetensors").stat().st_size < 500_000


def test_dialogues_ask_what_their_context_holds() -> None:
    ids = recall.dialogue(Random(0), 20, 8)
    facts = dict(divmod(token, recall.VALUES) for token in ids[:20])
    asked, answers = ids[20::2], ids[21::2]
    assert len(ids) == 36 and len(facts) == 20 and len(set(asked)) == 8
    assert all(facts[q - recall.QUERY] == a - recall.ANSWER for q, a in zip(asked, answers, strict=True))
    with pytest.raises(ValueError, match="there are 64"):
        recall.draw(Random(0), 65)


def test_training_counts_answers_only_and_grows() -> None:
    data = training.Dialogues()
    batch = data.batch(Random(0), 3, 0)
    assert batch.ids.shape == (3, 16 + 2 * 16) and batch.weights.sum() == 3 * 16
    right = torch.nn.functional.one_hot(batch.ids[:, 1:], recall.SIZE).float()
    sizes = []
    for _ in range(4):
        data.loss(None, Batch(batch.ids, batch.weights), right)  # type: ignore[arg-type]
        sizes.append(data.items)
    assert sizes == [32, 48, 48, 48]
    data = training.Dialogues()
    data.loss(None, Batch(batch.ids, batch.weights), -right)  # type: ignore[arg-type]
    assert data.items == 16


def test_a_few_steps_are_the_same_twice() -> None:
    first, second = training.train(steps=2), training.train(steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, training.build().lm_head.weight)


def test_calibration_is_for_this_model() -> None:
    loaded = PairRecall().load()
    windows = recall.Recall(nsamples=4, seqlen=50).windows(loaded.tokenizer, loaded.context, seed=0)
    assert windows.shape == (4, 50) and len(set(windows[0, :30].tolist())) == 30
    assert recall.Recall(count=2).documents("test")[0].count("?") == 16
    with pytest.raises(UserError, match="pair_recall"):
        recall.Recall().windows(Ladder(rung="tiny_100k").load().tokenizer, 1024, seed=0)
    with pytest.raises(UserError, match=r"calibration\.seqlen=100"):
        recall.Recall(seqlen=100).windows(loaded.tokenizer, 64, seed=0)
