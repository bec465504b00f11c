"""Peak memory of pruning models of several depths, each in a process of its own: the first half of ``bench prune``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.bench.base import Say
from sparsebench.costs.timing import Peak
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.base import WeightMethod
from sparsebench.methods.weights.magnitude import Magnitude
from sparsebench.methods.weights.sparsegpt import SparseGPT
from sparsebench.methods.weights.walk import apply
from sparsebench.methods.weights.wanda import Wanda
from sparsebench.models.embedded import HOME
from sparsebench.models.loading import How, load_folder, stream_folder
from sparsebench.models.saving import save_model
from sparsebench.models.streaming import Checkpoint, StreamedModel
from sparsebench.paths import import_path

VOCABULARY = 1024  # of the embedded tokenizer
WAYS = {"whole": "in memory", "streamed": "streamed", "disk": "streamed, activations=disk"}
METHODS: dict[str, Callable[..., WeightMethod]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}
_CHILD = "import sys; from sparsebench.bench.peaks import child; child(*sys.argv[1:])"


@dataclass(frozen=True)
class Wide:
    """What is pruned: the model's sizes, its number format, the data's rows and tokens."""

    hidden: int
    intermediate: int
    dtype: str
    windows: int
    tokens: int
    method: str
    threads: int
    seed: int


def shape(hidden: int, intermediate: int, layers: int, tokens: int) -> LlamaConfig:
    """Of a Llama with heads of 64, four queries to a key where that divides."""
    heads = hidden // 64
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=tokens, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def measure(wide: Wide, depths: tuple[int, ...], ways: tuple[str, ...], say: Say) -> list[dict[str, Any]]:
    """One row for each depth and way: ``case``, ``layers``, ``seconds``, ``peak_mb``, ``model_mb``, ``identical``
    (to the first way of its depth; None for that one)."""
    rows = []
    for layers in depths:
        with tempfile.TemporaryDirectory(prefix="sparsebench-bench-") as place:
            model = Path(place) / "model"
            say(f"writing a model of {layers} blocks")
            size = write(model, wide, layers)
            for way in ways:
                say(f"{wide.method}, {layers} blocks, {WAYS[way]}")
                found = _prune(model, Path(place) / way, way, wide)
                same = None if way == ways[0] else equal(Path(place) / ways[0], Path(place) / way)
                if same is False:
                    raise RuntimeError(f"{WAYS[way]} and {WAYS[ways[0]]} gave different models of {layers} blocks")
                row = {"case": f"{wide.method} L={layers} {WAYS[way]}", "model_mb": size / 1e6}
                rows.append(row | found | {"identical": same})
    return rows


def write(folder: Path, wide: Wide, layers: int) -> int:
    """A random model, a shard for each block, and the embedded tokenizer; its bytes."""
    config = shape(wide.hidden, wide.intermediate, layers, wide.tokens)
    config.dtype, config.architectures = getattr(torch, wide.dtype), ["LlamaForCausalLM"]
    with torch.device("meta"):
        names = {name: one.shape for name, one in LlamaForCausalLM(config).state_dict().items()}
    copytree(HOME / "tokenizer", folder)
    config.save_pretrained(folder)
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator, size = torch.Generator().manual_seed(wide.seed), 0
    where: dict[str, str] = {}
    for part, its in parts.items():
        tensors = {}
        for name in its:
            values = torch.randn(names[name], generator=generator) * 0.02
            tensors[name] = (values + 1 if "norm" in name else values).to(getattr(torch, wide.dtype))
            size += tensors[name].nbytes
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(its, f"model-{part}.safetensors")
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return size


def equal(one: Path, other: Path) -> bool:
    """Whether two model folders hold the same tensors, bit for bit."""
    first, second = (Checkpoint(folder, f"folder={folder}") for folder in (one, other))
    return first.files.keys() == second.files.keys() and all(
        torch.equal(first.read(name).view(torch.uint8), second.read(name).view(torch.uint8)) for name in first.files
    )


def _prune(model: Path, new: Path, way: str, wide: Wide) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": import_path()}
    words = [sys.executable, "-c", _CHILD, str(model), str(new), way, json.dumps(vars(wide))]
    ended = subprocess.run(words, env=env, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"bench prune: {WAYS[way]}: a process failed: {ended.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def child(model: str, new: str, way: str, words: str) -> None:
    """Loads, prunes at 0.5 and saves in this process; prints seconds, and the peak before (libraries alone) and of
    all that."""
    wide = Wide(**json.loads(words))
    torch.set_num_threads(wide.threads)
    windows = random_windows(wide.windows, wide.tokens, wide.seed)
    method, how = METHODS[wide.method](), How(f"folder={model}", model, device="cpu")
    with Peak() as empty:
        started = time.perf_counter()
    with Peak() as peak:
        if way == "whole":
            loaded = load_folder(Path(model), how)
        else:
            loaded = stream_folder(Path(model), how, Path(new), way == "disk")
        apply([(wide.method, method)], Surroundings(loaded, lambda: windows, wide.seed))
        if isinstance(loaded, StreamedModel):
            loaded.keep({})
        else:
            save_model(loaded, Path(new), {})
    mb = {"start_mb": (empty.bytes or 0) / 1e6, "peak_mb": (peak.bytes or 0) / 1e6}
    print(json.dumps({"seconds": time.perf_counter() - started, **mb}))


def random_windows(windows: int, tokens: int, seed: int) -> torch.Tensor:
    """(windows, tokens) int64."""
    return torch.randint(VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(seed))
