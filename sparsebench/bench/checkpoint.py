"""A compressed model folder against the same model unpacked: loading, memory, tokens per second, logits.

The dense model is what transformers makes of the unpacked weights; the other one is loaded without ever unpacking them
and runs on the sparse kernels, layers that are too dense to be faster so included.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsebench.bench.base import Report, Say, judged, spread, threads
from sparsebench.bench.decode import decoding
from sparsebench.costs.paired import NOTE, columns, measure
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.kernels import build
from sparsebench.kernels.ops import MOST_ROWS
from sparsebench.models.compressed import load_compressed
from sparsebench.models.loading import How, load_folder


@dataclass(frozen=True)
class Options(Declared):
    """The folder and how to run it."""

    folder: str | None = option(None, "a compressed model folder (save_as=compressed, or export); required")
    context: int = option(64, "tokens in the cache", low=1, high=100000, unit="tokens")
    threads: int = option(1, "threads", low=1, high=1024)
    repeats: int = option(11, "rounds of pairs", low=3, high=10000)


def run(options: Options, say: Say) -> Report:
    """One row for each of the two. UserError when the folder is not a compressed model, or damaged."""
    if not options.folder:
        raise UserError("folder=: needed; a compressed model folder")
    with threads(options.threads), torch.inference_mode():
        return _report(Path(options.folder).expanduser(), options, say)


def _report(folder: Path, options: Options, say: Say) -> Report:
    seconds: dict[str, float] = {}
    models: dict[str, PreTrainedModel] = {}
    for name in ("compressed", "dense"):  # first the one that is checked to be compressed
        say(f"loading it {name}")
        started = time.perf_counter()
        how = How(f"folder={folder}", str(folder), device="cpu")
        models[name] = load_compressed(folder) if name == "compressed" else load_folder(folder, how).model
        seconds[name] = time.perf_counter() - started
    say("decoding with both")
    steps = {name: decoding(model, options.context) for name, model in models.items()}
    result = measure({"dense": steps["dense"]}, {"compressed": steps["compressed"]}, options.repeats)
    ids = torch.arange(MOST_ROWS)[None] * 7919 % models["dense"].config.get_text_config().vocab_size
    right, got = (models[name](input_ids=ids, use_cache=False).logits.float() for name in ("dense", "compressed"))
    rows: list[dict[str, Any]] = []
    for name in ("dense", "compressed"):
        row: dict[str, Any] = {"model": name, "load_s": seconds[name], "memory_mb": _bytes(models[name]) / 1e6}
        row |= {"ms_per_token": 1e3 * result.time(name), "tokens_per_s": 1 / result.time(name)}
        rows.append(row | columns(result, name, ("dense",)) | {"verdict": result.verdict()})
    facts = {
        "kernels": build.status(), **spread(options.threads), "context": options.context,
        "logits_differ": f"{float((got - right).abs().max() / right.abs().max()):.2g} of the largest",
    }  # fmt: skip
    return Report(judged(rows, facts), facts, ["memory_mb: parameters and buffers.", NOTE])


def _bytes(model: PreTrainedModel) -> int:
    """Of every parameter and buffer, once."""
    found = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())
