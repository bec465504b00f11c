"""Loading models from folders and from the hub's cache, and what bad input says. No network."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import huggingface_hub.constants
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsebench.catalogue import Catalogue
from sparsebench.errors import UserError
from sparsebench.models import embedded
from sparsebench.models.content import hub_content, weights_content
from sparsebench.models.embedded import Ladder
from sparsebench.models.loading import HuggingFace

CONF = Path(__file__).parents[2] / "conf" / "model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama in bfloat16 with a word tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copytree(original, tmp_path / "tiny")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that cannot be reached; returns its empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def refusal(**options: object) -> str:
    """The one line that loading with these options is refused with."""
    with pytest.raises(UserError) as error:
        loader = HuggingFace(**options)  # type: ignore[arg-type]
        loader.content()
        loader.load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_loads_in_evaluation_mode_with_its_context(folder: Path) -> None:
    loaded = HuggingFace(path=str(folder), device="cpu").load()
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.device == torch.device("cpu")
    assert (loaded.name, loaded.context) == (str(folder), 64)
    assert loaded.tokenizer("w3 w5")["input_ids"] == [3, 5]
    assert HuggingFace(path=str(folder), context=32, dtype="float32").load().context == 32


def test_bin_files_load_and_pickles_with_code_do_not(folder: Path, tmp_path: Path) -> None:
    before = HuggingFace(path=str(folder), dtype="float32").load().model.state_dict()
    state = {name: tensor.bfloat16() for name, tensor in before.items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    after = HuggingFace(path=str(folder), dtype="float32").load().model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    mark = folder / "executed"

    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (mark,))

    whole = (folder / "pytorch_model.bin").read_bytes()
    torch.save([1, 2], tmp_path / "list")
    bad = [
        pickle.dumps({"a": Evil()}, protocol=2),
        b"junk",
        b"",
        whole[: len(whole) // 2],
        (tmp_path / "list").read_bytes(),
    ]
    for content in bad:
        (folder / "pytorch_model.bin").write_bytes(content)
        assert "pytorch_model.bin is corrupt" in refusal(path=str(folder))
    assert not mark.exists()


def test_damaged_folders_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for damaged in (whole[: len(whole) // 2], b"", b"not weights at all"):
        weights.write_bytes(damaged)
        assert "model.safetensors is corrupt" in refusal(path=str(folder))
    weights.write_bytes(whole)
    for broken in ("{", "[]", "\x00"):
        config.write_text(broken)
        assert "config.json is corrupt" in refusal(path=str(folder))
    for change in ({"model_type": "no_such_type"}, {"hidden_size": "many"}, {"num_attention_heads": 0}):
        config.write_text(json.dumps({**json.loads(text), **change}))
        assert "config.json cannot be used" in refusal(path=str(folder))
    config.write_text(json.dumps({**json.loads(text), "num_hidden_layers": 3}))
    assert "do not fit its config.json" in refusal(path=str(folder))
    config.write_text(json.dumps({**json.loads(text), "num_hidden_layers": 1}))
    assert re.search(r"do not fit its config.json: 9 too many, first model.layers.1\.", refusal(path=str(folder)))
    config.write_text(json.dumps({**json.loads(text), "intermediate_size": 32}))
    assert "do not fit its config.json" in refusal(path=str(folder))
    config.write_text(text)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(path=str(folder))
    weights.unlink()
    assert "holds no weights" in refusal(path=str(folder))
    config.unlink()
    assert "no config.json" in refusal(path=str(folder))
    (tmp_path / "file").touch()
    assert "no such folder" in refusal(path=str(tmp_path / "file"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "a/b/c", "two words", "~/nothing/here", "../up"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(path: str) -> None:
    assert refusal(path=path).startswith(f"model.path={path}: no such folder, and not a hub name")


def test_options_are_refused_by_their_own_name(folder: Path) -> None:
    path = str(folder)
    assert refusal().startswith("model.path=None: needed")
    assert refusal(path=path, device="gpu").startswith("model.device=gpu: not a device; valid: auto, cpu")
    assert refusal(path=path, device="meta").startswith("model.device=meta: ")
    assert refusal(path=path, device="cpu", device_map="auto").startswith("model.device_map=auto: ")
    assert refusal(path=path, revision="main").startswith("model.revision=main: ")
    assert refusal(path=path, dtype="int8").startswith("dtype=int8: not a choice")
    assert refusal(path=path, context=0).startswith("context=0: ")
    if not torch.cuda.is_available():
        assert refusal(path=path, device="cuda").startswith("model.device=cuda: ")
        kernel = "flash_attention_2"
        assert refusal(path=path, attn_implementation=kernel).startswith(f"model.attn_implementation={kernel}: ")
    else:
        assert refusal(path=path, device="cuda:99").startswith("model.device=cuda:99: ")


def test_code_in_a_folder_runs_only_when_trusted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_type", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = folder / "executed"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    assert refusal(path=str(folder)).startswith("model.trust_remote_code=false: ")
    assert not mark.exists()


def test_content_follows_every_byte_that_matters(folder: Path) -> None:
    before = weights_content(folder)
    assert len(before) == 64
    (folder / "README.md").write_text("words")
    assert weights_content(folder) == before
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    assert weights_content(folder) != before


def test_content_of_a_sharded_folder_hashes_all_shards(folder: Path) -> None:
    loaded = HuggingFace(path=str(folder)).load()
    (folder / "model.safetensors").unlink()
    loaded.model.save_pretrained(folder, max_shard_size="2KB")
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 1
    before = weights_content(folder)
    again = HuggingFace(path=str(folder)).load().model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.model.state_dict().items())
    with found[-1].open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    assert weights_content(folder) != before
    found[0].unlink()
    assert "shards that are missing" in refusal(path=str(folder))


def test_content_imports_no_torch(folder: Path) -> None:
    source = (
        "import sys\nfrom sparsebench.models.loading import HuggingFace\n"
        "from sparsebench.models.embedded import Ladder\n"
        f"Ladder(); print(HuggingFace(path={str(folder)!r}).content())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=CONF.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == weights_content(folder)


def test_the_hub_cache_answers_without_a_network(original: Path, offline: Path) -> None:
    assert "hub cannot be reached" in refusal(path="owner/tiny")
    assert "hub cannot be reached" in refusal(path="owner/tiny", revision=COMMIT)
    cached = offline / "models--owner--tiny"
    copytree(original, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    loader = HuggingFace(path="owner/tiny")
    assert loader.content() == hub_content("owner/tiny", COMMIT) == COMMIT
    assert loader.load().context == 64
    assert "hub cannot be reached" in refusal(path="owner/tiny", revision="other")
    (cached / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert "holds no weights" in refusal(path="owner/tiny")


def test_the_ladder_runs_its_bfloat16_files_in_float32(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree(original, original.parent / "tiny_1m")
    monkeypatch.setattr(embedded, "HOME", original.parent)
    loaded = Ladder(device="cpu").load()
    assert (loaded.model.dtype, loaded.name, loaded.context) == (torch.float32, "tiny_1m", 64)
    assert Ladder().content() == weights_content(original)
    spiky = Ladder(outliers=True, device="cpu").load()
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(spiky.model(ids).logits, loaded.model(ids).logits)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(spiky.model.state_dict()[norm], loaded.model.state_dict()[norm])
    with pytest.raises(UserError, match=r"^model\.rung=tiny_100k: its weights are not in this installation"):
        Ladder(rung="tiny_100k").content()


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_agrees_with_its_declaration(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# @package model\n")
    values = yaml.safe_load(text) or {}
    known = Catalogue()
    known.add_files((CONF.parents[1] / "sparsebench" / "models").glob("*.py"))
    declaration = known.get("model", values.pop("kind", file.stem))
    for name, value in values.items():
        option = declaration.options[name]
        assert option.check(f"model.{name}", value) == value
        assert value != option.default, f"{name} repeats the declared default"
    assert declaration.name != "hf" or file.stem == "hf" or values["path"].count("/") == 1
