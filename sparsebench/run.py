"""A run as plain data: what was chosen, validated and filled in, and the ids that follow from it.

No torch here: runs are made, hashed and looked up in the store before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError

DEFAULT_STORE = "sparsebench-store"


def store_folder(given: str | None = None) -> Path:
    """The store's folder: what was given, else the variable SPARSEBENCH_STORE, else the default."""
    if given in (None, DEFAULT_STORE):
        given = os.environ.get("SPARSEBENCH_STORE") or DEFAULT_STORE
    return Path(str(given)).expanduser()


@dataclass(frozen=True)
class RunOptions(Declared):
    """Options of the run itself, given without a prefix (``sparsity=0.5``)."""

    sparsity: float | None = option(
        None, "zeros / all over each method's scope; 0.5 where neither it nor a pattern is given", low=0.0, below=1.0
    )
    pattern: str | None = option(None, "unstructured, or n:m with n KEPT of m along the input dimension")
    seed: int = option(0, "random numbers of methods and calibration draws", low=0, high=2**31 - 1)
    store: str = option(
        "sparsebench-store", "folder of the records; the variable SPARSEBENCH_STORE sets another default"
    )
    force: bool = option(False, "run again although the store has the answer")
    kernel: str = option(
        "none", "measure milliseconds on sparse kernels; none: none are measured", choices=("none", "auto", "reference")
    )
    save: str | None = option(None, "folder to write the sparse model to, as a Hugging Face model")
    save_as: str = option(
        "plain",
        "how it is saved; compressed: as small as it is sparse, `export` turns it back",
        choices=("plain", "compressed"),
    )
    streamed: bool = option(
        False,
        "keep one decoder block of the model in memory and write the pruned ones to save=<folder> as they are made",
    )
    activations: str = option(
        "memory", "streamed: where hidden states of calibration and text are kept", choices=("memory", "disk")
    )
    format: str = option("table", "how results are printed", choices=("table", "csv", "json", "parquet"))
    batch_size: int = option(16, "rows per forward in evaluation; never changes an id", low=1, high=4096)
    threads: int | None = option(None, "CPU threads; all cores where not given", low=1, high=1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save is not None and not self.save:
            raise UserError("save=: needs the name of a folder")
        if self.save_as != "plain" and not self.save:
            raise UserError(f"save_as={self.save_as}: needs a folder: save=<folder>")
        if self.activations != "memory" and not self.streamed:
            raise UserError(f"activations={self.activations}: goes with streamed=true")
        if self.streamed and not self.save:
            raise UserError("streamed=true: needs a folder for the pruned model: save=<folder>")
        if self.streamed and self.save_as != "plain":
            raise UserError(f"save_as={self.save_as}: streamed=true writes it plain; `export` compresses it afterwards")
        if self.streamed and self.kernel != "none":
            raise UserError(f"kernel={self.kernel}: needs the whole model in memory, so not streamed=true")


@dataclass(frozen=True)
class Part:
    """One chosen method, model, calibration or task. ``label``: its name on the command line;
    ``name``: its declaration; ``changed``: options that differ from their declared defaults; ``files``:
    for options that name a file, the sha256 of its content, which is what the id depends on."""

    kind: str
    label: str
    name: str
    version: int
    options: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "options": self.changed | self.files}


@dataclass(frozen=True)
class Run:
    """One point of the grid: method(s) x model x calibration x task x seed."""

    methods: tuple[Part, ...]
    model: Part
    calibration: Part | None
    task: Part
    corpus: Part | None
    options: RunOptions

    @property
    def label(self) -> str:
        """``wanda``, or ``wanda+dsnot`` for a stack."""
        return "+".join(method.label for method in self.methods)

    @property
    def leading(self) -> Part:
        """The method whose level is the run's: the first that has one; if none has, the first."""
        return next((method for method in self.methods if "sparsity" in method.options), self.methods[0])

    @property
    def sparsity(self) -> float | None:
        """The level that was asked for; None if no method has one."""
        return self.leading.options.get("sparsity")

    @property
    def pattern(self) -> str:
        patterns = [method.options["pattern"] for method in self.methods if "pattern" in method.options]
        return patterns[0] if patterns else "unstructured"

    @property
    def seed(self) -> int | None:
        """The seed if a method uses it, else None (the result pairs with every seed)."""
        return self.options.seed if any("seed" in method.uses for method in self.methods) else None

    def sparse_model_id(self, content: str) -> str:
        """The id of the sparse model; ``content`` identifies the model's weights."""
        return _digest(self._sparse_model(content))

    def run_id(self, content: str) -> str:
        """The id of the run: the sparse model, the task, and the kernels that are timed."""
        task = self.task.identity() | ({"corpus": self.corpus.identity()} if self.corpus else {})
        kernel = {"kernel": self.options.kernel} if self.options.kernel != "none" else {}
        return _digest({**self._sparse_model(content), "task": task, **kernel})

    def _sparse_model(self, content: str) -> dict[str, Any]:
        model = self.model.identity() | {"content": content}
        model["options"] = {k: v for k, v in self.model.changed.items() if k not in _PLACES}
        parts: dict[str, Any] = {"methods": [method.identity() for method in self.methods], "model": model}
        if self.calibration is not None:
            parts["calibration"] = self.calibration.identity()
        if self.seed is not None:
            parts["seed"] = self.seed
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Everything that was resolved, for the store."""

        def plain(part: Part | None) -> dict[str, Any] | None:
            return (
                None
                if part is None
                else {"label": part.label, "name": part.name, "version": part.version, "options": part.options}
            )

        return {
            "methods": [plain(method) for method in self.methods],
            "model": plain(self.model),
            "calibration": plain(self.calibration),
            "task": plain(self.task),
            "seed": self.seed,
        }


_PLACES = {"path", "revision", "rung", "device", "device_map", "trust_remote_code"}
"""Model options that say where the weights are and where they run: their content is hashed instead."""


def _digest(value: Any) -> str:
    text = json.dumps(_rounded(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """Floats to 12 digits, whole floats as they are written (0.5 and 0.50 are one run)."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value
