"""Pruning: peak memory of a model that is streamed block by block, and time against a plain layer-by-layer form.

Memory: a random Llama of several depths is pruned and saved, whole in memory and streamed, each time in a process of
its own; the results must be equal bit for bit. Speed: one model is pruned by this project's walk and by the plain form
of the papers' sheets (``naive``) in turn, on the same data; the masks must be equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from sparsebench.bench import naive, peaks
from sparsebench.bench.base import Report, Say, threads
from sparsebench.bench.naive import Level
from sparsebench.costs.paired import Call, Measured
from sparsebench.costs.paired import columns as ratio_columns
from sparsebench.costs.paired import measure as paired
from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.methods.base import Surroundings
from sparsebench.methods.weights.base import WeightMethod
from sparsebench.methods.weights.walk import apply
from sparsebench.models.base import LoadedModel
from sparsebench.models.blocks import decoder_blocks
from sparsebench.models.restoring import Original

_COLUMNS = "case seconds start_mb peak_mb model_mb vs_naive vs_naive_quartiles identical differ verdict".split()
_ROUNDING = 1e-4  # of the entries: two orders of summation may rank a few near-ties of SparseGPT differently


@dataclass(frozen=True)
class Options(Declared):
    """The models, the data, and what is measured."""

    part: str = option("both", "what is measured", choices=("both", "memory", "speed"))
    layers: tuple[int, ...] = option((8, 16, 32), "memory: decoder blocks of the models", low=1, high=1000)
    hidden: int = option(512, "memory: width, a multiple of 64", low=64, high=16384)
    intermediate: int = option(1408, "memory: width of the MLP", low=64, high=65536)
    dtype: str = option("float32", "memory: number format of the weights", choices=("bfloat16", "float32"))
    method: str = option("wanda", "memory: what prunes", choices=("magnitude", "wanda", "sparsegpt"))
    ways: tuple[str, ...] = option(
        ("whole", "streamed"), "memory: how the model is held", choices=("whole", "streamed", "disk")
    )
    methods: tuple[str, ...] = option(
        ("magnitude", "wanda", "sparsegpt"), "speed: what prunes", choices=("magnitude", "wanda", "sparsegpt")
    )
    blocks: int = option(2, "speed: decoder blocks of the model", low=1, high=200)
    width: int = option(192, "speed: width, a multiple of 64", low=64, high=16384)
    mlp: int = option(512, "speed: width of the MLP", low=64, high=65536)
    levels: tuple[float, ...] = option((0.5, 0.75), "speed: sparsities of one model in a row", low=0.0, below=1.0)
    windows: int = option(16, "calibration windows", low=1, high=100000)
    tokens: int = option(128, "tokens of a window", low=1, high=100000, unit="tokens")
    threads: int = option(1, "threads", low=1, high=1024)
    repeats: int = option(3, "speed: rounds of pairs", low=3, high=10000)
    seed: int = option(0, "of the random weights and data", low=0)


def run(options: Options, say: Say) -> Report:
    """Rows of memory, then of speed. RuntimeError when two ways that must agree do not."""
    for name in ("hidden", "width"):
        if getattr(options, name) % 64:
            raise UserError(f"{name}={getattr(options, name)}: must be a multiple of 64")
    rows: list[dict[str, Any]] = []
    notes = []
    if options.part != "speed":
        wide = peaks.Wide(
            options.hidden, options.intermediate, options.dtype, options.windows, options.tokens, options.method,
            options.threads, options.seed,
        )  # fmt: skip
        rows += peaks.measure(wide, options.layers, options.ways, say)
        notes.append(
            "memory: load, prune to 0.5 and save in a process of its own; start_mb is its resident set with the "
            "libraries alone, peak_mb the largest one; identical: to the first way, bit for bit."
        )
    if options.part != "memory":
        rows += _speed(options, say)
        notes.append(
            "speed: CPU seconds for all levels of the case, calibration included; vs_naive is the median over pairs. "
            "differ: mask entries that are not those of the plain form (sparsegpt sums in another order)."
        )
    facts = {
        "threads": options.threads, "windows": f"{options.windows}x{options.tokens}", "torch": torch.__version__,
        "memory": f"{options.hidden}/{options.intermediate} {options.dtype}",
        "speed": f"{options.blocks} blocks {options.width}/{options.mlp} float32",
    }  # fmt: skip
    return Report([{column: row.get(column) for column in _COLUMNS} for row in rows], facts, notes)


@dataclass(frozen=True)
class Case:
    """One method at some levels of one model. ``dense``: calibration sees the dense model (``sequential=none``)."""

    method: str
    levels: tuple[Level, ...]
    dense: bool = False

    @property
    def name(self) -> str:
        levels = [one.pattern or f"{one.sparsity:g}" for one in self.levels]
        return f"{self.method} {'+'.join(levels)}{' sequential=none' if self.dense else ''}"

    def made(self, level: Level) -> WeightMethod:
        seen = {} if self.method == "magnitude" else {"sequential": "none" if self.dense else "block"}
        return peaks.METHODS[self.method](sparsity=level.sparsity, pattern=level.pattern, **seen)


def cases(options: Options) -> list[Case]:
    """Each method at one sparsity, at 2:4, and at several sparsities of one model."""
    row = tuple(Level(level) for level in options.levels)
    found = [Case(method, one) for method in options.methods for one in ((Level(0.5),), (Level(0.5, (2, 4)),), row)]
    return found + [Case(method, row, dense=True) for method in options.methods if method != "magnitude"]


def _speed(options: Options, say: Say) -> list[dict[str, Any]]:
    with threads(options.threads):
        torch.manual_seed(options.seed)
        config = peaks.shape(options.width, options.mlp, options.blocks, options.tokens)
        model = LlamaForCausalLM(config).eval()
        windows = peaks.random_windows(options.windows, options.tokens, options.seed)
        subject = Subject(model, Original(model), windows)
        rows = []
        for case in cases(options):
            say(case.name)
            rows.append(_row(case, subject, options.repeats))
        return rows


@dataclass(frozen=True)
class Subject:
    """The model that is pruned again and again, its dense weights, and the data."""

    model: PreTrainedModel
    original: Original
    windows: Tensor

    def ours(self, case: Case, after: Callable[[], object] = lambda: None) -> None:
        """All levels, one after the other, as runs of one process do; ``after`` is called behind each."""
        shared: dict[str, Any] = {}
        loaded = LoadedModel(self.model, None, "random", self.windows.shape[1])  # type: ignore[arg-type]
        for level in case.levels:
            self.original.restore(self.model)
            apply([(case.method, case.made(level))], Surroundings(loaded, lambda: self.windows, 0, shared=shared))
            after()

    def plain(self, case: Case, after: Callable[[], object] = lambda: None) -> None:
        """The same by the plain form."""
        for level in case.levels:
            self.original.restore(self.model)
            naive.prune(self.model, case.method, level, self.windows, case.dense)
            after()

    def masks(self) -> Tensor:
        """What is left of the blocks' matrices, in one row: bool."""
        weights = [one for one in decoder_blocks(self.model)[1].parameters() if one.dim() == 2]
        return torch.cat([weight.detach().flatten() != 0 for weight in weights])


def _row(case: Case, subject: Subject, rounds: int) -> dict[str, Any]:
    found = differing(case, subject)
    taken: Measured = paired(
        {"naive": lambda number: subject.plain(case)}, {"ours": lambda number: subject.ours(case)}, rounds, _cpu
    )
    row = {"case": case.name, "seconds": taken.time("ours"), "identical": found == 0, "differ": found}
    return row | ratio_columns(taken, "ours", ("naive",)) | {"verdict": taken.verdict()}


def differing(case: Case, subject: Subject) -> int:
    """Mask entries, of all levels, in which the two forms differ. RuntimeError when that is more than rounding."""
    masks: list[list[Tensor]] = [[], []]
    for form, its in zip((subject.ours, subject.plain), masks, strict=True):
        form(case, lambda its=its: its.append(subject.masks()))  # type: ignore[misc]
    ours, plain = map(torch.cat, masks)
    found = int((ours != plain).count_nonzero())
    if found > (_ROUNDING * ours.numel() if case.method == "sparsegpt" else 0):
        raise RuntimeError(f"bench prune: {case.name}: {found} of {ours.numel()} mask entries differ")
    return found


def _cpu(call: Call, number: int) -> float:
    """CPU seconds of a call: what a busy machine takes away meanwhile does not count."""
    started = time.process_time()
    call(number)
    return time.process_time() - started
