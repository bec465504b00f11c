"""``streamed=true``: one block in memory at a time, and everything as if the whole model had been there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from commands import Command
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.base import WeightMethod
from sparsebench.methods.weights.dense import Dense
from sparsebench.methods.weights.essential_sparsity import EssentialSparsity
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.random import Random
from sparsebench.methods.weights.sparsegpt import SparseGPT
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models import streaming
from sparsebench.models.base import LoadedModel
from sparsebench.models.embedded import HOME
from sparsebench.models.loading import How, load_folder, stream_folder
from sparsebench.models.saving import save_model

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
WINDOWS = torch.randint(2, 64, (5, 20), generator=torch.Generator().manual_seed(11))

FEW = ["calibration.nsamples=4", "calibration.seqlen=32"]

PRUNERS: dict[str, WeightMethod] = {
    "dense": Dense(),
    "random": Random(sparsity=0.5),
    "magnitude": Magnitude(sparsity=0.5),
    "magnitude 2:4": Magnitude(pattern="2:4"),
    "magnitude erk": Magnitude(sparsity=0.5, group="row", allocation="erk"),
    "wanda": Wanda(sparsity=0.6),
    "wanda 2:4": Wanda(pattern="2:4"),
    "wanda layer by layer": Wanda(sparsity=0.6, sequential="layer"),
    "wanda of the dense model": Wanda(sparsity=0.6, sequential="none"),
    "sparsegpt": SparseGPT(sparsity=0.5, blocksize=16),
    "sparsegpt 4:8": SparseGPT(pattern="4:8"),
    "sparsegpt of the dense model": SparseGPT(sparsity=0.5, sequential="none"),
    "sparsegpt 4 bits": SparseGPT(sparsity=0.5, wbits=4, true_sequential=True),
    "essential": EssentialSparsity(sparsity=0.5, variant="layer"),
    "essential 2:4": EssentialSparsity(pattern="2:4"),
    "essential erk_random": EssentialSparsity(sparsity=0.5, variant="erk_random"),
}


def write(model: nn.Module, folder: Path, **how: Any) -> Path:
    copytree(HOME / "tokenizer", folder)
    model.save_pretrained(folder, **how)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head and embedding are one tensor; in several shards."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    folder = write(model, tmp_path_factory.mktemp("models") / "llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def both(source: Path, method: WeightMethod, place: Path, how: How | None = None, on_disk: bool = False) -> LoadedModel:
    """Prunes in memory into ``place/whole`` and streamed into ``place/streamed``; the latter model."""
    how = how or How("model.path=x", "x", device="cpu")
    whole = load_folder(source, how)
    streamed = stream_folder(source, how, place / "streamed", on_disk)
    notes = []
    for loaded in (whole, streamed):
        applied = apply([("method", method)], Surroundings(loaded, lambda: WINDOWS, 5))
        notes.append((applied.layers, applied.notes, applied.tolerance, applied.warnings))
    assert notes[0] == notes[1]
    save_model(whole, place / "whole", {})
    streamed.keep({})  # type: ignore[attr-defined]
    assert_same(place / "whole", place / "streamed")
    assert sorted(one.name for one in place.iterdir()) == ["streamed", "whole"]  # no draft, no hidden states
    return streamed


@pytest.mark.parametrize("name", PRUNERS)
def test_the_result_is_that_of_pruning_in_memory(name: str, llama: Path, tmp_path: Path) -> None:
    method = PRUNERS[name]
    assert method.blockwise
    both(llama, method, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype="auto")  # as any other tool would
    assert found.lm_head.weight is found.model.embed_tokens.weight
    zeros = float((found.model.layers[2].mlp.down_proj.weight == 0).float().mean())
    assert zeros == 0 if name == "dense" else zeros > 0.3


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("family", ["gemma2", "opt", "bfloat16"])
def test_families_and_formats(family: str, on_disk: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    config: Any
    if family == "gemma2":  # every second block sees a window of 8 tokens
        config = Gemma2Config(
            **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
            pad_token_id=0,
        )  # fmt: skip
        source = write(Gemma2ForCausalLM(config), tmp_path / "source")
    elif family == "opt":  # learned positions in front, a norm behind, biases
        source = write(OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)), tmp_path / "source")
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False))
        source = write(model.to(torch.bfloat16), tmp_path / "source")
    (tmp_path / "new").mkdir()
    streamed = both(source, Wanda(sparsity=0.5), tmp_path / "new", on_disk=on_disk)
    kept = load_folder(tmp_path / "new" / "streamed", How("x", "x", device="cpu"))
    expected = [logits.clone() for logits in kept.logits(WINDOWS, 2)]
    assert all(map(torch.equal, streamed.logits(WINDOWS, 2), expected))
    assert sorted(one.name for one in (tmp_path / "new" / "streamed").iterdir() if one.is_dir()) == []


def test_outliers_are_made_block_by_block(llama: Path, tmp_path: Path) -> None:
    both(llama, Wanda(sparsity=0.5), tmp_path, How("x", "x", device="cpu", outliers_sigma=1.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_number_format_is_asked_for(dtype: str, llama: Path, tmp_path: Path) -> None:
    both(llama, Magnitude(sparsity=0.5), tmp_path, How("x", "x", device="cpu", dtype=dtype))


def test_one_block_is_in_memory_at_a_time(llama: Path, tmp_path: Path) -> None:
    loaded = stream_folder(llama, How("x", "x", device="cpu"), tmp_path / "new", False)
    seen: list[list[int]] = []
    identities = {name: id(parameter) for name, parameter in loaded.model.named_parameters()}

    def look(done: int, total: int) -> None:
        blocks = loaded.blocks().modules
        seen.append([i for i, block in enumerate(blocks) if not next(block.parameters()).is_meta])

    apply([("wanda", Wanda())], Surroundings(loaded, lambda: WINDOWS, 0, look))
    assert seen == [[0], [1], [2]]
    assert identities == {name: id(parameter) for name, parameter in loaded.model.named_parameters()}
    written = sorted(file.name for file in tmp_path.glob(".new.*/*.safetensors"))
    assert len(written) == 3 and not (tmp_path / "new").exists()
    loaded.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_a_run_from_the_command_line(activations: str, command: Command, small: list[str], tmp_path: Path) -> None:
    words = [*filter(lambda word: "context" not in word, small), "method=wanda", "task.context=16,32", "-m", *FEW]
    whole = command(*words, "store=" + str(tmp_path / "other"), f"save={tmp_path / 'whole'}", "format=json")
    streamed = command(
        *words, "streamed=true", f"activations={activations}", f"save={tmp_path / 'new' / 'streamed'}", "format=json"
    )
    assert whole.code == streamed.code == 0, streamed.err
    assert_same(tmp_path / "whole", tmp_path / "new" / "streamed")
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["streamed"]
    same = "run_id sparse_model_id perplexity achieved achieved_model flops_prefill bytes_weights".split()
    for one, other in zip(json.loads(whole.out), json.loads(streamed.out), strict=True):
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    notes = [
        json.loads((folder / "sparsebench.json").read_text())
        for folder in (tmp_path / "whole", tmp_path / "new" / "streamed")
    ]
    assert notes[0]["achieved"] == notes[1]["achieved"] and notes[0]["sparse_model_id"] == notes[1]["sparse_model_id"]


REFUSED = {
    "no folder": ("streamed=true", "streamed=true: needs a folder for the pruned model: save=<folder>"),
    "activations alone": ("activations=disk save={new}", "activations=disk: goes with streamed=true"),
    "compressed at once": ("streamed=true save={new} save_as=compressed", "save_as=compressed: streamed=true writes"),
    "kernels": ("streamed=true save={new} kernel=auto", "kernel=auto: needs the whole model"),
    "recovery": ("method=[magnitude,perp] {few} streamed=true save={new}", "streamed=true: method=perp"),
    "gqsa": ("method=gqsa {few} streamed=true save={new}", "streamed=true: method=gqsa"),
    "one ranking": ("method=magnitude method.magnitude.group=global streamed=true save={new}", "method=magnitude"),
    "essential": ("method=essential_sparsity streamed=true save={new}", "streamed=true: method=essential_sparsity"),
    "cache": ("method=[wanda,h2o] task.protocol=continuation {few} streamed=true save={new}", "streamed=true: "),
    "task": ("method=magnitude task.protocol=continuation streamed=true save={new}", "streamed=true: task=perplexity"),
    "spread": ("method=magnitude streamed=true save={new} model.device_map=auto", "model.device_map=auto"),
    "not empty": ("method=magnitude streamed=true save={full}", "save={full}: the folder exists and is not empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_streamed(name: str, command: Command, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    places = {"new": tmp_path / "new", "full": tmp_path / "full", "few": " ".join(FEW)}
    words, message = (text.format(**places) for text in REFUSED[name])
    answer = command(*small, *words.split())
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1, answer.err
    assert answer.records == [] and not (tmp_path / "new").exists()
    assert not any(".new." in one.name for one in tmp_path.iterdir())


def pickles(folder: Path) -> None:
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


def lacks(folder: Path) -> None:
    found = tensors(folder)
    del found["model.layers.1.mlp.up_proj.weight"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    found = tensors(folder) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def more_layers(folder: Path) -> None:
    found = tensors(folder) | {"model.layers.7.mlp.up_proj.weight": torch.zeros(3, 3)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(pickles, "has no safetensors files, only pytorch_model.bin"), (lacks, "model.layers.1.mlp.up_proj.weight"),
     (other_shape, "do not fit its config.json"), (torn, "model.safetensors"),
     (more_layers, "1 too many, first model.layers.7.mlp.up_proj.weight")],
    ids=["pickles", "lacks", "other_shape", "torn", "more_layers"],
)  # fmt: skip
def test_folders_that_cannot_be_streamed(
    spoil: Callable[[Path], None], message: str, command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = copytree(tiny_folder, tmp_path / "model")
    spoil(folder)
    words = ["model=hf", f"model.path={folder}", f"task.file={text_file}", "task.context=32", "calibration=kjv"]
    answer = command(*words, "method=magnitude", "streamed=true", f"save={tmp_path / 'new'}")
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1, answer.err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["here", "model"]


def test_a_compressed_folder_is_made_plain_first(llama: Path, tmp_path: Path) -> None:
    from sparsebench.models.compressed import compress_folder

    folder = tmp_path / "compressed"
    folder.mkdir()
    compress_folder(llama, folder, "to=x")
    with pytest.raises(UserError, match=r"^streamed=true: model.path=x is compressed; `export` makes it plain again$"):
        stream_folder(folder, How("model.path=x", "x", device="cpu"), tmp_path / "new", False)


@pytest.mark.parametrize("what", ["method", "disk"])
def test_a_failure_half_way_leaves_a_record_and_no_folder(
    what: str, command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "disk":
        writes: list[Path] = []

        def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
            writes.append(file)
            if len(writes) == 2:
                raise OSError(28, "No space left on device")
            save_file(tensors, file, metadata=metadata)

        monkeypatch.setattr(streaming, "save_file", full)
    else:
        calls: list[str] = []

        def select(self: Magnitude, layer: Any) -> Tensor:
            calls.append(layer.name)
            if len(calls) == 9:  # in the second block
                raise RuntimeError("out of memory")
            return torch.ones_like(layer.weight, dtype=torch.bool)

        monkeypatch.setattr(Magnitude, "select", select)
    new = tmp_path / "saved" / "new"
    answer = command(*small, "method=magnitude", "streamed=true", "activations=disk", f"save={new}")
    assert answer.code == 1, answer.err
    [record] = answer.records
    assert record["status"] == "failed"
    assert ("out of memory" if what == "method" else "No space left on device") in record["error"]
    assert not new.exists() and list(tmp_path.glob("saved/.*")) == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SPARSEBENCH_STORE", str(tmp_path / "store"))
    assert command(*small, "method=magnitude", "streamed=true", f"save={new}").code == 0  # nothing is in the way
    assert (new / "model.safetensors.index.json").is_file()
