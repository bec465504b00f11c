"""``doctor``: versions, devices, what is available here and why not."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sparsebench import __version__
from sparsebench.errors import UserError
from sparsebench.paths import data_folder

_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "lm_eval",
    "hydra-core",
    "pandas",
    "pyarrow",
)
_OPTIONAL = {"wandb": "tracking", "submitit": "launching on Slurm"}

Finding = tuple[str, str, str]  # what, ok | missing | problem, detail


def report(store: Path, format: str) -> str:
    """The findings as text or JSON."""
    found = list(_findings(store))
    if format == "json":
        return json.dumps([dict(zip(("what", "status", "detail"), one, strict=True)) for one in found], indent=1) + "\n"
    width = max(len(what) for what, _, _ in found)
    return "".join(f"{what:<{width}}  {status:<8} {detail}\n" for what, status, detail in found)


def _findings(store: Path) -> Iterator[Finding]:
    yield "sparsebench", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    for name in _LIBRARIES:
        try:
            yield name, "ok", version(name)
        except PackageNotFoundError:
            yield name, "problem", "not installed; `make demo` or `pip install -c constraints.txt -e .` installs it"
    for name, use in _OPTIONAL.items():
        there = find_spec(name) is not None
        yield name, "ok" if there else "missing", version(name) if there else f"optional, for {use}"
    yield from _devices()
    yield from _data()
    yield from _store(store)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield "devices", "problem", f"torch cannot be imported: {error}"
        return
    yield "cpu", "ok", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        built = torch.version.cuda
        why = "no GPU is visible to this CUDA build" if built else "this torch is a CPU build"
        yield "cuda", "missing", f"{why}; model.device=cpu works everywhere"
    from sparsebench.kernels import build

    for what, device in (("sparse kernels", "cpu"), ("gpu kernels", "cuda")):
        status = build.status(device)
        yield what, "missing" if status.startswith("reference") else "ok", status


def _data() -> Iterator[Finding]:
    from sparsebench.models.embedded import HOME

    rungs = sorted(folder.name for folder in HOME.iterdir() if (folder / "config.json").exists())
    yield "embedded models", "ok" if rungs else "problem", ", ".join(rungs) or f"no weights in {HOME}; install again"
    try:
        yield "configuration", "ok", str(data_folder("conf"))
    except UserError as error:
        yield "configuration", "problem", str(error)
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    yield (
        "hub",
        "missing" if offline else "ok",
        "HF_HUB_OFFLINE is set: only cached models and data"
        if offline
        else ("asked only for model=hf, hub corpora and hub tasks; needs a network"),
    )


def _store(folder: Path) -> Iterator[Finding]:
    from sparsebench.results.store import Store

    if not folder.exists():
        yield "store", "ok", f"{folder} (made by the first run)"
        return
    try:
        store = Store(folder)
        store.check_writable()
        yield "store", "ok", f"{folder}, {len(store.records())} runs, {store.torn} torn lines"
    except UserError as error:
        yield "store", "problem", str(error)
