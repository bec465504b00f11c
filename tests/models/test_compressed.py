"""Compressed model folders: what comes back, how small they are, and that loading one never unpacks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from sparsebench.errors import UserError
from sparsebench.kernels import build, formats
from sparsebench.kernels.formats import GroupQuantised
from sparsebench.kernels.swap import SparseLinear
from sparsebench.models import compressed
from sparsebench.models.compressed import compress_folder, dense_weights, load_compressed, unpack_folder
from sparsebench.models.content import COMPRESSED, is_compressed, weights_content

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": LlamaConfig(**LLAMA, attention_bias=True, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA),
    "gemma2": Gemma2Config(**LLAMA, sliding_window=8),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),  # weights (in, out)
}
IDS = torch.arange(12)[None] * 5


def pruned(config: Any, dtype: torch.dtype = torch.float32, level: float = 0.5) -> PreTrainedModel:
    """A random model of which every matrix in a block has so many zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_()
            elif any(part.isdigit() for part in name.split(".")):
                weight.masked_fill_(torch.rand(weight.shape) < level, 0)
    return model


def saved(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder / "plain", **how)
    (folder / "small").mkdir()
    return folder / "plain"


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    raw = [{k: (v.dtype, v.shape, v.flatten().view(torch.uint8).tolist()) for k, v in x.items()} for x in (one, other)]
    return raw[0] == raw[1]


def logits(model: nn.Module, tokens: int) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS[:, :tokens]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_and_loaded_as_it_is(family: str, tmp_path: Path) -> None:
    plain = saved(pruned(FAMILIES[family]), tmp_path)
    small, back = tmp_path / "small", tmp_path / "back"
    back.mkdir()
    sizes = compress_folder(plain, small, "x")
    assert is_compressed(small) and not is_compressed(plain)
    assert "dense" not in sizes.formats and sizes.linears < 0.7 * sizes.linears_dense
    assert unpack_folder(small, back, "x").row() == sizes.row()
    assert same_bits(dense_weights(small, "x"), load_file(plain / "model.safetensors"))
    dense, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in (plain, back))  # as any tool would
    assert same_bits(again.state_dict(), dense.state_dict())
    assert (back / "generation_config.json").read_bytes() == (plain / "generation_config.json").read_bytes()
    loaded = load_compressed(small)
    packed = [one for one in loaded.modules() if isinstance(one, SparseLinear)]
    assert len(packed) == (0 if family == "gpt2" else sizes.formats.total())
    for tokens in (1, 12):
        assert torch.allclose(logits(loaded, tokens), logits(dense, tokens), atol=1e-4)
        assert torch.allclose(logits(load_compressed(small, "reference"), tokens), logits(dense, tokens), atol=1e-4)


@pytest.mark.parametrize(("level", "most"), [(0.5, 0.57), (0.7, 0.37)])
def test_sizes_at_half_and_at_seven_tenths(level: float, most: float, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model = pruned(config, torch.bfloat16, level)
    plain = saved(model, tmp_path)
    sizes = compress_folder(plain, tmp_path / "small", "x")
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sizes.linears_dense == sum(2 * weight.numel() for weight in weights)
    assert sizes.linears / sizes.linears_dense <= most
    files = [file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors")]
    assert sum(files) == sizes.file and len(files) == 3  # one per block, one for the rest
    assert sizes.file < 1.02 * (sizes.linears + sizes.file_dense - sizes.linears_dense)


def test_loading_makes_no_dense_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(LlamaConfig(**LLAMA | {"hidden_size": 256, "intermediate_size": 512}), torch.bfloat16, 0.7)
    sizes = compress_folder(saved(model, tmp_path), tmp_path / "small", "x")
    monkeypatch.setattr(formats, "_unpack", None)
    loaded = load_compressed(tmp_path / "small")
    held = sum(one.numel() * one.element_size() for one in [*loaded.parameters(), *loaded.buffers()])
    offsets = 8 * sum(len(one.matrix.offsets) for one in loaded.modules() if isinstance(one, SparseLinear))
    assert held < 1.01 * sizes.file + offsets + 64 * sizes.formats.total() and held < 0.5 * sizes.file_dense
    if build.library() is not None:
        logits(loaded, 12)  # nor does running it


def test_nan_and_negative_zeros_come_back(tmp_path: Path) -> None:
    model = pruned(FAMILIES["qwen3"], torch.bfloat16, 0.7)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[0, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 0.0])
    other = model.model.layers[1].mlp.up_proj.weight.data
    other[:] = torch.randn(other.shape).bfloat16() * (torch.rand(other.shape) < 0.3)  # as a mask multiplies: -0.0
    plain = saved(model, tmp_path)
    exact = compress_folder(plain, tmp_path / "small", "x")
    assert same_bits(dense_weights(tmp_path / "small", "x"), load_file(plain / "model.safetensors"))
    assert exact.negative_zeros == int(((other == 0) & other.signbit()).sum()) + 1 and exact.negative_zeros > 400
    (tmp_path / "less").mkdir()
    less = compress_folder(plain, tmp_path / "less", "x", drop_negative_zeros=True)
    assert less.negative_zeros == 0 and less.linears == exact.linears - 2 * exact.negative_zeros
    for name, tensor in dense_weights(tmp_path / "less", "x").items():
        assert torch.equal(tensor.nan_to_num(), load_file(plain / "model.safetensors")[name].nan_to_num())


def test_formats_are_chosen_by_size(tmp_path: Path) -> None:
    model = pruned(FAMILIES["qwen3"])
    layer = model.model.layers[0]
    layer.mlp.gate_proj.weight.data.normal_().masked_fill_(torch.tensor([0, 1, 1, 0]).bool().repeat(48, 8), 0)
    layer.mlp.up_proj.weight.data.normal_()
    layer.self_attn.o_proj.weight.data = (layer.self_attn.o_proj.weight.data != 0).double()
    sizes = compress_folder(saved(model, tmp_path), tmp_path / "small", "x")
    assert sizes.formats == {"bitmap": 11, "2:4": 1, "dense": 2}
    assert "2:4" in sizes.text() and f"{sizes.file:,}" in sizes.text()


def test_groups_that_a_method_quantised_are_stored_as_they_are(tmp_path: Path) -> None:
    model = pruned(FAMILIES["qwen3"], torch.bfloat16)
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1)]
    packed = {name: GroupQuantised.from_dense(model.get_parameter(name), torch.rand(48, 2) < 0.5) for name in names}
    model.get_parameter(names[0]).data = packed[names[0]].dense().bfloat16()  # the other one was changed since
    plain = saved(model, tmp_path)
    sizes = compress_folder(plain, tmp_path / "small", "x", packed=packed)
    assert sizes.formats["4-bit groups"] == 1
    assert same_bits(dense_weights(tmp_path / "small", "x"), load_file(plain / "model.safetensors"))
    loaded = load_compressed(tmp_path / "small").bfloat16()  # which leaves the scales in half precision
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj").matrix, GroupQuantised)
    right = logits(AutoModelForCausalLM.from_pretrained(plain, dtype="auto"), 3)
    assert (logits(loaded, 3) - right).abs().max() < 0.02 * right.abs().max()
    index = json.loads((tmp_path / "small" / COMPRESSED).read_text())
    for dtypes in ({}, {names[0]: "int8"}, {names[0]: "nonsense"}, []):
        (tmp_path / "small" / COMPRESSED).write_text(json.dumps(index | {"dtypes": dtypes}))
        with pytest.raises(UserError, match=r"^x: [^\n]*is corrupt[^\n]*$"):
            dense_weights(tmp_path / "small", "x")


def test_shards_pickles_and_the_content_hash(tmp_path: Path) -> None:
    model = pruned(FAMILIES["llama"])
    plain = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(plain.glob("*.safetensors"))) > 2
    compress_folder(plain, tmp_path / "small", "x")
    old = tmp_path / "old"
    old.mkdir()
    model.config.save_pretrained(old)
    model.generation_config.save_pretrained(old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")  # holds the tied head a second time
    (tmp_path / "again").mkdir()
    compress_folder(old, tmp_path / "again", "x")
    first, second = (dense_weights(tmp_path / name, "x") for name in ("small", "again"))
    assert torch.equal(second.pop("lm_head.weight"), first["model.embed_tokens.weight"])
    assert same_bits(first, second)
    (tmp_path / "third").mkdir()
    compress_folder(plain, tmp_path / "third", "x")
    hashes = [weights_content(tmp_path / name) for name in ("plain", "small", "third")]
    assert hashes[1] == hashes[2] != hashes[0]  # of the bytes as they lie there
    file = next((tmp_path / "third").glob("compressed-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert weights_content(tmp_path / "third") != hashes[1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "swapped", "foreign", "index", "no map"])
def test_a_damaged_folder_is_one_line(damage: str, tmp_path: Path) -> None:
    compress_folder(saved(pruned(FAMILIES["qwen3"]), tmp_path), tmp_path / "small", "x")
    small = tmp_path / "small"
    file, other = small / "compressed-00002-of-00003.safetensors", small / "compressed-00003-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-9])
    elif damage == "flipped":
        data[-5] ^= 4
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
    elif damage == "swapped":
        file.write_bytes(other.read_bytes())
    elif damage == "foreign":
        save_file({"a": torch.ones(2)}, file)
    elif damage == "index":
        (small / COMPRESSED).write_text("{")
    else:
        index = json.loads((small / COMPRESSED).read_text())
        (small / COMPRESSED).write_text(json.dumps(index | {"weight_map": {}}))
    for attempt in (lambda: dense_weights(small, "x"), lambda: load_compressed(small)):
        with pytest.raises(UserError, match=r"^(x|load )[^\n]*$"):
            attempt()


def test_what_does_not_fit_its_config(tmp_path: Path) -> None:
    compress_folder(saved(pruned(FAMILIES["qwen3"]), tmp_path), tmp_path / "small", "x")
    small = tmp_path / "small"
    config = json.loads((small / "config.json").read_text())
    for change, message in (
        ({"intermediate_size": 40}, "config.json says"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "missing, first model.layers.2"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "has no model.layers.1"),
    ):
        (small / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=rf"^load [^\n]*{message}[^\n]*$"):
            load_compressed(small)
    with pytest.raises(UserError, match="kernel=fast"):
        load_compressed(small, "fast")
    with pytest.raises(UserError, match=r"plain: its weights are not compressed"):
        load_compressed(tmp_path / "plain")


def test_only_a_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, no file and so no set of tensors that is held at once is larger than a block or the rest."""
    plain = saved(pruned(Qwen3Config(**LLAMA | {"num_hidden_layers": 8})), tmp_path)
    sizes = compress_folder(plain, tmp_path / "small", "x")
    held: list[int] = []
    (tmp_path / "back").mkdir()
    original = compressed.save_file

    def spy(tensors: dict[str, Tensor], *rest: Any) -> None:
        held.append(sum(one.numel() * one.element_size() for one in tensors.values()))
        original(tensors, *rest)

    monkeypatch.setattr(compressed, "save_file", spy)
    unpack_folder(tmp_path / "small", tmp_path / "back", "x")
    assert len(held) == 9 and sum(held) == sizes.file_dense and max(held) < sizes.file_dense / 4
    files = sorted((tmp_path / "small").glob("compressed-*"))
    assert len(files) == 9 and max(file.stat().st_size for file in files) < sizes.file / 3
