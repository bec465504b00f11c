"""Tokens per second of a random-weight Llama at batch 1: dense, sparse weights, sparse activations, and both.

The model has the shape of a real one (about 0.5 billion parameters by default, bfloat16) and random weights; only the
linear layers of its blocks are replaced. The output head stays dense: torch's product reads it at about half of the
memory's speed, and next to sparse layers that becomes a large share, so ``head=own`` gives it the dense kernel that the
others are compared with. One token is decoded again and again behind a short cache. Everything is timed in pairs in one
process, so that the ratios hold whatever the machine does meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsebench.bench.base import Report, Say, judged, spread, threads
from sparsebench.costs.paired import NOTE, Call, columns, measure
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.kernels import build, lists, ops
from sparsebench.kernels.formats import NM, Bitmap, ColumnBitmap, ColumnMajor, Columns
from sparsebench.kernels.swap import Replaced, SparseLinear, Swap, installed
from sparsebench.models import caching

HEAD_DIM = 128


@dataclass(frozen=True)
class Options(Declared):
    """The model and what to run it with."""

    layers: int = option(8, "decoder blocks", low=1, high=200)
    hidden: int = option(2048, "width, a multiple of 128", low=128, high=16384)
    intermediate: int = option(5632, "width of the MLP", low=64, high=65536)
    vocabulary: int = option(32000, "tokens known", low=16, high=1000000)
    context: int = option(64, "tokens in the cache", low=1, high=100000, unit="tokens")
    sparsity: tuple[float, ...] = option((0.5, 0.7, 0.9), "of the weights", low=0.05, high=0.99)
    activations: float = option(0.5, "sparsity of the inputs where they are sparse", low=0.05, high=0.99)
    head: str = option(
        "own", "whose dense kernel the output head runs on beside sparse layers", choices=("own", "torch")
    )
    threads: int = option(1, "threads", low=1, high=1024)
    repeats: int = option(11, "rounds of pairs", low=3, high=10000)
    seed: int = option(0, "of the random weights", low=0)


class _Dense(nn.Module):
    """The dense kernel that sparse ones are compared with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return ops.dense_gemv(x.reshape(-1), self.weight).view(*x.shape[:-1], -1)


class _Skipping(nn.Module):
    """A weight, dense or a bitmap, that is read only for inputs beyond a threshold: TEAL's kernel at a known level.

    The threshold is found on the first token, as a method fits it before it decodes; the token is the same in every
    call."""

    def __init__(self, matrix: Columns, sparsity: float) -> None:
        super().__init__()
        self.matrix, self.count = matrix, max(1, int(sparsity * matrix.columns))
        self.threshold: float | None = None

    @property
    def read(self) -> int:
        """Bytes of the weights that a token reads."""
        return int((1 - self.count / self.matrix.columns) * self.matrix.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold is None:
            self.threshold = float(x.abs().flatten().kthvalue(self.count).values)
        return ops.skipping_linear(x, self.matrix, self.threshold)


def run(options: Options, say: Say) -> Report:
    """One row per variant."""
    if options.hidden % HEAD_DIM:
        raise UserError(f"hidden={options.hidden}: must be a multiple of {HEAD_DIM}")
    if options.intermediate % 4:
        raise UserError(f"intermediate={options.intermediate}: must be a multiple of 4, for 2:4")
    with threads(options.threads), torch.inference_mode():
        return _report(options, say)


def _report(options: Options, say: Say) -> Report:
    say("making the model")
    model = _model(options)
    variants = _variants(model, options, say)
    step = decoding(model, options.context)
    calls: dict[str, Call] = {"torch": step, **{name: _with(model, swap, step) for name, swap in variants.items()}}
    bases = {name: calls.pop(name) for name in ("torch", "own")}
    say(f"decoding with {len(variants) + 1} variants")
    result = measure(bases, calls, options.repeats)
    dense = sum(one.weight.numel() * one.weight.element_size() for one in _linears(model).values())
    rows: list[dict[str, Any]] = []
    for name in result.seconds:
        size = variants[name].bytes if name in variants else dense
        seconds = result.time(name)
        row: dict[str, Any] = {"variant": name, "ms_per_token": 1e3 * seconds, "tokens_per_s": 1 / seconds}
        row |= columns(result, name, ("torch", "own"))
        rows.append(row | {"linear_mb": size / 1e6, "verdict": result.verdict(row["vs_own"], dense / size)})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "kernels": build.status(), **spread(options.threads), "parameters": f"{parameters / 1e9:.2f}e9",
        "dtype": "bfloat16", "head": options.head, "context": options.context, "torch": torch.__version__,
        "rounds": options.repeats,
    }  # fmt: skip
    notes = [
        "linear_mb: weights of the blocks' linear layers; attention, norms and Python are the same everywhere; the "
        "output head is dense: with head=own on a kernel of ours but in torch's row, with head=torch (as in a run with "
        "kernel=auto) on torch's.",
        "columns: dense weights, inputs beyond a threshold; w+x: sparse weights on them; linear_mb: what is read.",
        NOTE,
    ]
    return Report(judged(rows, facts), facts, notes)


def _model(options: Options) -> PreTrainedModel:
    torch.manual_seed(options.seed)
    heads = options.hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else 1, max_position_embeddings=options.context + 1,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: PreTrainedModel = LlamaForCausalLM(config).eval()
        return model
    finally:
        torch.set_default_dtype(before)


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head}


def _variants(model: PreTrainedModel, options: Options, say: Say) -> dict[str, Swap]:
    """Name -> the modules that replace the linear layers."""
    found = {name: Swap(build.status()) for name in _names(options)}
    for name, linear in _linears(model).items():
        weight = linear.weight.detach()
        rank = torch.rand(weight.shape)
        modules: dict[str, tuple[nn.Module, int]] = {"own": (_Dense(weight), _bytes(weight))}
        for level in options.sparsity:
            made: Any = lists.Lists if lists.pays(level) else Bitmap
            packed = made.from_dense(weight, rank >= level)
            modules[_weights(level)] = (SparseLinear(packed, None), packed.nbytes)
        pairs = rank.view(len(weight), -1, 4).argsort(-1).argsort(-1).view(weight.shape) < 2
        half = NM.from_dense(weight, 2, 4, pairs)
        modules["2:4"] = (SparseLinear(half, None), half.nbytes)
        both = ColumnBitmap.from_dense(weight, rank >= options.sparsity[0])
        for variant, matrix in ((_columns(options), ColumnMajor.from_dense(weight)), (_stacked(options), both)):
            skipping = _Skipping(matrix, options.activations)
            modules[variant] = (skipping, skipping.read)
        for variant, (module, taken) in modules.items():
            swap = found[variant]
            swap.modules[name] = module
            swap.layers.append(Replaced(name, variant, taken / _bytes(weight), taken, _bytes(weight)))
        say(f"packed {name}")
    if options.head == "own":
        head: Any = model.get_output_embeddings()
        name, dense = next(name for name, one in model.named_modules() if one is head), _Dense(head.weight.detach())
        for swap in found.values():
            swap.modules[name] = dense
    return found


def _names(options: Options) -> list[str]:
    return ["own", *map(_weights, options.sparsity), "2:4", _columns(options), _stacked(options)]


def _weights(level: float) -> str:
    return f"{'lists' if lists.pays(level) else 'bitmap'} {level:g}"


def _columns(options: Options) -> str:
    return f"columns {options.activations:g}"


def _stacked(options: Options) -> str:
    return f"w+x {options.sparsity[0]:g}+{options.activations:g}"


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def decoding(model: PreTrainedModel, context: int) -> Call:
    """Decodes one token behind a cache of ``context`` tokens, which is as long afterwards as before."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, context))
    cache = DynamicCache(config=model.config)
    caching.read(model, ids, cache)
    token = ids[:, :1]

    def step(number: int) -> object:
        logits, _ = caching.read(model, token, cache)
        cache.crop(-1)
        return logits

    return step


def _with(model: PreTrainedModel, swap: Swap, step: Call) -> Call:
    def call(number: int) -> object:
        with installed(model, swap):
            return step(number)

    return call
