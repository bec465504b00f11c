"""The C kernels: compiled on first use with the system's compiler, kept in a cache, called through ctypes.

One library per instruction set (``avx512``: F, BW, VL, DQ, VBMI2 and BF16; ``avx512vbmi2``: these without BF16;
``avx2``: with FMA and F16C; ``neon``: of 64-bit ARM; ``portable``: what the compiler targets by itself), each compiled
with flags of its own, so that a machine never runs what its processor lacks and a cluster's home folder can be shared
by different machines. A library's name in the cache is a hash of sources, flags, compiler version and instruction set;
it is written aside and renamed, so processes that start together at worst compile the same thing twice. Without a
working compiler there is no library and the torch reference runs instead; ``status`` says which.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # loaded before the kernels, so that both use one OpenMP runtime and its threads

from sparsebench.errors import UserError
from sparsebench.kernels import gpu

SOURCES = Path(__file__).parent / "c"
REFERENCE = "reference"

_COMMON = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),  # NaN and infinity stay what they are
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2")
_FLAGS = {  # best first
    "avx512": (*_AVX512, "-mavx512bf16"),
    "avx512vbmi2": _AVX512,
    "avx2": _AVX2,
    "neon": ("-DSB_NEON",),
    "portable": (),
}
_NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2", "avx512_bf16"},
    "avx512vbmi2": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2"},
    "avx2": {"avx2", "fma", "f16c", "popcnt", "bmi1", "bmi2"},
    "neon": {"asimd"},
}
_SECONDS = 120  # a compiler that takes longer counts as broken

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_loaded: dict[str, Library | str] = {}  # instruction set -> its library, or why there is none
_forced: list[str] = []


@dataclass(frozen=True)
class Library:
    """A loaded set of kernels. ``isa``: the instruction set it was compiled for; ``openmp``: whether it has threads."""

    isa: str
    openmp: bool
    calls: ctypes.CDLL

    def threads(self) -> int:
        """How many threads a kernel should use: torch's setting, 1 without OpenMP."""
        return torch.get_num_threads() if self.openmp else 1


def library() -> Library | None:
    """The kernels for this machine, compiled now if need be; None where the torch reference must do."""
    isa = _forced[-1] if _forced else best_isa()
    if isa == REFERENCE:
        return None
    found = _loaded.get(isa)  # every product asks
    if found is None:
        with _lock:
            if isa not in _loaded:
                _loaded[isa] = _make(isa)
                if isinstance(_loaded[isa], str):
                    _log.warning("sparse kernels: the torch reference runs instead (%s)", _loaded[isa])
            found = _loaded[isa]
    return None if isinstance(found, str) else found


def status(device: str = "cpu") -> str:
    """Which kernels run on tensors of a device ("cpu", "cuda"), for ``doctor`` and the record: ``c avx512``,
    ``triton 3.9.0``, ``reference (no C compiler ...)`` ..."""
    if device != "cpu":
        return gpu.status()
    found = library()
    if found is not None:
        return f"c {found.isa}" + ("" if found.openmp else " (one thread: no OpenMP)")
    if _forced and _forced[-1] == REFERENCE:
        return "reference"
    return f"reference ({_loaded[_forced[-1] if _forced else best_isa()]})"


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Runs the block with the kernels of one instruction set, or with ``reference``. For the whole process.

    UserError if this machine cannot run them.
    """
    valid = [*supported(), REFERENCE]
    if isa not in valid:
        raise UserError(f"isa={isa}: not on this machine; valid: {', '.join(valid)}")
    _forced.append(isa)
    try:
        yield
    finally:
        _forced.pop()


def supported() -> list[str]:
    """The instruction sets whose kernels this machine can run, best first."""
    return list(_supported())


def best_isa() -> str:
    """The best of ``supported``."""
    return next(_supported())


def _supported() -> Iterator[str]:
    features = _features()
    return (isa for isa in _FLAGS if isa not in _NEEDS or _NEEDS[isa] <= features)


def forget() -> None:
    """Drops what was loaded or found missing in this process, so that the next use looks again."""
    with _lock:
        _loaded.clear()


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``sparsebench`` in XDG_CACHE_HOME, or in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "sparsebench" / "kernels"


@cache
def _features() -> set[str]:
    """The processor's features as Linux names them; empty where it does not say (then: portable)."""
    if platform.machine() in ("aarch64", "arm64"):
        return {"asimd"}  # every processor of this kind has it
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return set()
    flags = (line.partition(":")[2] for line in text.splitlines() if line.startswith("flags"))
    return set(next(flags, "").split())


def _make(isa: str) -> Library | str:
    """The library from the cache or the compiler, or why there is none."""
    compiler = shutil.which(os.environ.get("CC", "") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler"
    if sys.byteorder != "little":
        return "a big-endian machine"
    problem = ""
    for openmp in (("-fopenmp",), ()):  # Apple's clang has no OpenMP
        command = [compiler, *_COMMON, *_FLAGS[isa], *openmp]
        try:
            return Library(isa, bool(openmp), _opened(command, isa))
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            problem = f"{Path(compiler).name} failed: {' '.join(str(detail).split())[:200]}"
    return problem


def _opened(command: list[str], isa: str) -> ctypes.CDLL:
    """The library; a kept one that is damaged is compiled again. OSError or SubprocessError where it cannot be had."""
    file = _compiled(command, isa)
    try:
        return _declared(ctypes.CDLL(str(file)))
    except OSError:
        _compile(command, sorted(SOURCES.glob("*.c")), file)
        return _declared(ctypes.CDLL(str(file)))


def _compiled(command: list[str], isa: str) -> Path:
    """The path of the compiled library. OSError or SubprocessError where that cannot be done."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True, timeout=_SECONDS)
    sources = sorted(SOURCES.glob("*.c"))
    parts = [version.stdout, isa, platform.machine(), *command]
    parts += [file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.[ch]"))]
    name = f"{isa}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / name
        if not file.exists():
            _compile(command, sources, file)
        return file
    except PermissionError:  # a home that cannot be written: compile for this process alone
        file = Path(tempfile.mkdtemp(prefix="sparsebench-kernels-")) / name
        _compile(command, sources, file)
        return file


def _compile(command: list[str], sources: list[Path], file: Path) -> None:
    """Compiles beside ``file``, then renames."""
    handle, aside = tempfile.mkstemp(prefix=file.stem, suffix=".part", dir=file.parent)
    os.close(handle)
    try:
        words = [*command, *map(str, sources), "-o", aside, "-lm"]
        subprocess.run(words, capture_output=True, text=True, check=True, timeout=_SECONDS)
        os.replace(aside, file)
    finally:
        Path(aside).unlink(missing_ok=True)


_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "sb_bitmap_gemm": (_P, _P, _P, _L, _I, _L, _L, _P, _L, _P, _P, _I),
    "sb_bitmap_unpack": (_P, _P, _P, _L, _I, _L, _L, _P, _I),
    "sb_columns_gemv": (_P, _I, _L, _L, _P, _F, _P, _P, _P, _I),
    "sb_strips_gemv": (_P, _P, _P, _P, _I, _L, _L, _L, _P, _F, _P, _P, _I),
    "sb_strips_unpack": (_P, _P, _P, _P, _I, _L, _L, _L, _P, _I),
    "sb_lists_gemm": (_P, _P, _P, _P, _P, _L, _L, _P, _L, _P, _P, _I),
    "sb_lists_unpack": (_P, _P, _P, _P, _P, _L, _L, _P, _I),
    "sb_groups_gemm": (_P, _P, _I, _P, _P, _P, _L, _L, _L, _I, _P, _L, _P, _P, _I),
    "sb_blocks_attention": (_P, _P, _P, _I, *(_L,) * 5, _F, _L, _P, _P, _P, _P, _I),
    "sb_kv_attention": (_P, _I, _L, _L, _L, _F, _P, _P, _L, _L, _L, _L, _P, _P, _L, _P, _I),
    "sb_rows_gemv": (_P, _I, _L, _L, _P, _P, _P, _P, _I),
    "sb_read": (_P, _L, _P, _I),
}


def _declared(calls: ctypes.CDLL) -> ctypes.CDLL:
    """Gives every function its argument types; OSError if one is missing."""
    for name, types in _SIGNATURES.items():
        try:
            function = getattr(calls, name)
        except AttributeError as error:
            raise OSError(f"{name} is missing from {calls._name}") from error
        function.argtypes, function.restype = types, ctypes.c_int
    return calls
