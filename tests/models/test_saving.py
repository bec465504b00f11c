"""A saved model is a plain Hugging Face folder that loads back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.models.loading import HuggingFace
from sparsebench.models.outliers import inject_outliers
from sparsebench.models.saving import check_folder, save_model


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A random tiny Llama, half of its projection weights zero, with outliers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(request.param).eval()
    inject_outliers(model, 1.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[:, ::2] = 0
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LoadedModel(model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0"), "tiny", 64)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_reload_is_equal_bit_for_bit(loaded: LoadedModel, tmp_path: Path) -> None:
    target = tmp_path / "new" / "saved"
    save_model(loaded, target, {"method": "wanda", "sparsity": 0.5})
    assert json.loads((target / "sparsebench.json").read_text()) == {"method": "wanda", "sparsity": 0.5}
    assert (target / "model.safetensors").is_file()
    assert [one.name for one in target.parent.iterdir()] == ["saved"]  # no draft stays behind
    again = HuggingFace(path=str(target), device="cpu").load()
    assert same(again.model.state_dict(), loaded.model.state_dict())
    assert again.context == 64
    plain = AutoModelForCausalLM.from_pretrained(target, dtype="auto")  # as any other tool would
    assert same(plain.state_dict(), loaded.model.state_dict())
    assert AutoTokenizer.from_pretrained(target)("w3 w5")["input_ids"] == [3, 5]
    save_model(again, tmp_path / "copy", {})
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


def test_others_may_read_what_the_user_lets_them(loaded: LoadedModel, tmp_path: Path) -> None:
    save_model(loaded, tmp_path / "model", {})
    (tmp_path / "plain").touch()
    modes = {file.name: file.stat().st_mode for file in [*(tmp_path / "model").iterdir(), tmp_path / "plain"]}
    assert set(modes.values()) == {modes["plain"]} and "model.safetensors" in modes


def test_an_empty_folder_is_filled_and_a_full_one_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    save_model(loaded, target, {})
    before = (target / "model.safetensors").read_bytes()
    for attempt in (lambda: save_model(loaded, target, {}), lambda: check_folder(target)):
        with pytest.raises(UserError, match=r"^save=[^\n]*not empty[^\n]*$"):
            attempt()
    assert (target / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^save=[^\n]*not a folder[^\n]*$"):
        save_model(loaded, tmp_path / "file", {})
    with pytest.raises(UserError, match=r"^save=[^\n]*cannot be written[^\n]*$"):
        save_model(loaded, tmp_path / "file" / "below", {})


def test_a_failed_write_leaves_nothing(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded.tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match=r"^save=[^\n]*No space left on device$"):
        save_model(loaded, tmp_path / "saved", {})
    assert list(tmp_path.iterdir()) == []
