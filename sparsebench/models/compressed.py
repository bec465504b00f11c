"""Model folders that are as small as their sparsity: every pruned linear layer as a bitmap and packed values.

A compressed folder holds what a Hugging Face folder holds beside the weights, and in place of these
``compressed-<i>-of-<n>.safetensors`` (``kernels.container``: one file per decoder block, one for the rest) under
``compressed.safetensors.index.json`` (``weight_map``: tensor -> file, as in the index of a sharded model). Both ways
work file by file and tensor by tensor: no more than a block is in memory.

Packed is the weight (out, in) of every layer inside a decoder block if that makes it smaller; n:m is recognised, 4-bit
groups are stored as they are. Embedding, head, norms and biases stay as they were, and so does a tied weight, which is
there once. Every tensor comes back bit for bit, NaN and negative zeros included: left out is an entry whose bits are
all zero, and nothing else. Which of the zeros a mask had kept is not stored.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparsebench.errors import UserError
from sparsebench.kernels import container
from sparsebench.kernels.bits import bits_of
from sparsebench.kernels.container import Entry
from sparsebench.kernels.formats import GroupQuantised, Matrix
from sparsebench.kernels.lists import quickest
from sparsebench.kernels.swap import KINDS, SparseLinear, compress, format_of
from sparsebench.models.content import COMPRESSED, is_compressed, one_line, read_json, weight_files
from sparsebench.models.loading import pickled, quiet

# Beside the weights, what belongs to a model: settings, tokenizer, code, licence, what methods learned.
_BESIDE = "*.json *.txt *.model *.jinja *.tiktoken *.py *.md LICENSE* sparsebench-*.safetensors".split()
_INDICES = (COMPRESSED, "model.safetensors.index.json", "pytorch_model.bin.index.json")
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")  # the first number in a tensor's name is its block


@dataclass
class Sizes:
    """Bytes of weights, compressed and dense: of the linear layers inside the blocks, and of everything.

    ``file``: bytes of the compressed files, headers included; ``file_dense``: of all tensors. ``formats``: how many
    linear layers are stored in which; ``negative_zeros``: kept as values, since they are not plain zeros."""

    linears: int = 0
    linears_dense: int = 0
    file: int = 0
    file_dense: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    negative_zeros: int = 0

    def add(self, name: str, entry: Entry, dense: int) -> None:
        """Counts an entry that takes ``dense`` bytes as a dense tensor."""
        self.file_dense += dense
        if _is_linear(name, entry):
            self.linears_dense += dense
            self.linears += container.stored_bytes(entry)
            self.formats["dense" if isinstance(entry, Tensor) else format_of(entry)] += 1

    def row(self) -> dict[str, Any]:
        """Flat, for JSON."""
        return {
            "linears_bytes": self.linears,
            "linears_dense_bytes": self.linears_dense,
            "linears_ratio": self.linears / max(1, self.linears_dense),
            "file_bytes": self.file,
            "file_dense_bytes": self.file_dense,
            "file_ratio": self.file / max(1, self.file_dense),
            "formats": dict(sorted(self.formats.items())),
            "negative_zeros": self.negative_zeros,
        }

    def text(self) -> str:
        """Three lines for people."""
        row, formats = self.row(), ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        lines = [f"{'':12}{'compressed':>16}{'dense':>16}{'ratio':>8}"]
        for what, name in (("linears", "linears"), ("whole file", "file")):
            small, dense = row[f"{name}_bytes"], row[f"{name}_dense_bytes"]
            lines.append(f"{what:12}{small:16,}{dense:16,}{row[f'{name}_ratio']:8.3f}")
        lines[1] += f"   ({formats or 'none'})"
        if self.negative_zeros:
            lines.append(f"{self.negative_zeros:,} negative zeros are stored as values: export negative_zeros=drop")
        return "\n".join(lines) + "\n"


def compress_folder(
    source: Path,
    target: Path,
    named: str,
    *,
    drop_negative_zeros: bool = False,
    packed: Mapping[str, Matrix] | None = None,
) -> Sizes:
    """Writes the plain Hugging Face folder ``source`` compressed to the folder ``target``.

    ``named``: what messages begin with; ``packed``: tensor -> the matrix to store for it, if that is the tensor bit
    for bit in its dtype. UserError when ``source`` is damaged or no model.
    """
    sizes = Sizes()
    weight_map: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    with ExitStack() as stack:
        plain = _plain(source, named, stack)
        groups = _blocks(plain)
        for number, names in enumerate(groups, 1):
            entries: dict[str, Entry] = {}
            for name in names:
                tensor = _got(plain[name], name, named)
                entries[name] = _packed(name, tensor, (packed or {}).get(name), drop_negative_zeros)
                sizes.add(name, entries[name], tensor.numel() * tensor.element_size())
                sizes.negative_zeros += _negative_zeros(entries[name])
                if isinstance(entries[name], GroupQuantised):
                    dtypes[name] = str(tensor.dtype).removeprefix("torch.")
            file = target / f"compressed-{number:05}-of-{len(groups):05}.safetensors"
            sizes.file += container.write(file, entries)
            weight_map |= dict.fromkeys(names, file.name)
    total = {"total_size": sizes.file, "dense_size": sizes.file_dense}
    _write_json({"metadata": total, "weight_map": weight_map, "dtypes": dtypes}, target / COMPRESSED)
    copy_beside(source, target)
    return sizes


def unpack_folder(source: Path, target: Path, named: str) -> Sizes:
    """Writes the compressed folder ``source`` as a plain one to ``target``. UserError when ``source`` is damaged."""
    sizes, files = Sizes(), weight_files(source, named)
    weight_map: dict[str, str] = {}
    for number, (file, entries, dtypes) in enumerate(entries_of(source, named), 1):
        whole = {name: dense_of(name, entry, dtypes) for name, entry in entries.items()}
        for name, tensor in whole.items():
            sizes.add(name, entries[name], tensor.numel() * tensor.element_size())
            sizes.negative_zeros += _negative_zeros(entries[name])
        sizes.file += file.stat().st_size
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file(whole, target / name, {"format": "pt"})
        weight_map |= dict.fromkeys(whole, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sizes.file_dense}, "weight_map": weight_map}
        _write_json(index, target / "model.safetensors.index.json")
    copy_beside(source, target)
    return sizes


def entries_of(folder: Path, named: str) -> Iterator[tuple[Path, dict[str, Entry], dict[str, torch.dtype]]]:
    """File by file: its path, what is in it, and the dtype in which a model has the matrices that have none.

    UserError when something is missing or damaged: every byte is checked before it is given out.
    """
    index = read_json(folder / COMPRESSED, named)
    weight_map, dtypes = index.get("weight_map"), index.get("dtypes")
    if not isinstance(weight_map, dict) or not isinstance(dtypes, dict):
        raise UserError(f"{named}: {COMPRESSED} is corrupt: it lacks weight_map or dtypes")
    known = {name: getattr(torch, str(dtype), None) for name, dtype in dtypes.items()}
    if not all(isinstance(dtype, torch.dtype) and dtype.is_floating_point for dtype in known.values()):
        raise UserError(f"{named}: {COMPRESSED} is corrupt: it names an unknown dtype")
    for file in weight_files(folder, named):
        try:
            entries = container.read(file)
        except UserError as error:
            raise UserError(f"{named}: {str(error).replace(str(file), file.name)}") from None
        if entries.keys() != {name for name, place in weight_map.items() if place == file.name}:
            raise UserError(f"{named}: {file.name} does not hold what {COMPRESSED} says")
        if any(isinstance(entry, GroupQuantised) and name not in known for name, entry in entries.items()):
            raise UserError(f"{named}: {COMPRESSED} is corrupt: it lacks the dtype of a matrix of 4-bit groups")
        yield file, entries, {name: dtype for name, dtype in known.items() if dtype is not None}


def dense_of(name: str, entry: Entry, dtypes: Mapping[str, torch.dtype]) -> Tensor:
    """The tensor as the model had it; ``dtypes``: as ``entries_of`` gives them."""
    if isinstance(entry, Tensor):
        return entry
    return entry.dense().to(dtypes[name]) if isinstance(entry, GroupQuantised) else entry.dense()


def dense_weights(folder: Path, named: str) -> dict[str, Tensor]:
    """All tensors of a compressed folder, unpacked: the whole dense model. UserError as ``entries_of``."""
    return {
        name: dense_of(name, entry, dtypes)
        for _, entries, dtypes in entries_of(folder, named)
        for name, entry in entries.items()
    }


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration with empty parameters (meta device); its buffers are filled as ever."""
    loader: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = loader.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    return model


@torch.no_grad()
def load_compressed(folder: Path, kernel: str = "auto") -> PreTrainedModel:
    """The model of a compressed folder on the CPU, its packed layers as ``SparseLinear``: no dense matrix is made of
    them, so that the model is in memory as small as in the file. Evaluation mode, no gradients.

    ``kernel``: as in ``swap.plan``. UserError when the folder is not compressed, damaged, or does not fit its
    config.json.
    """
    named = f"load {folder}"
    if kernel not in KINDS:
        raise UserError(f"kernel={kernel}: valid: {', '.join(KINDS)}")
    weight_files(folder, named)
    if not is_compressed(folder):
        raise UserError(f"{named}: its weights are not compressed; `export` compresses a model")
    with quiet():
        model = skeleton(AutoConfig.from_pretrained(folder))
    for _, entries, dtypes in entries_of(folder, named):
        matrices = [name for name, entry in entries.items() if not isinstance(entry, Tensor)]
        if matrices:  # else a norm would keep the whole file mapped, whose matrices are in memory already
            entries = {name: one.clone() if isinstance(one, Tensor) else one for name, one in entries.items()}
        for name in matrices:
            path = name.removesuffix(".weight")
            module = _module(model, path, named)
            if type(module) is nn.Linear:
                bias = entries.pop(f"{path}.bias", None)
                matrix = cast(Matrix, entries.pop(name))
                _fits(name, (matrix.rows, matrix.columns), module.weight, named)
                held = quickest(matrix) if kernel == "auto" else matrix
                model.set_submodule(path, SparseLinear(held, cast(Tensor | None, bias), kernel))
        for name, entry in entries.items():
            _fill(model, name, dense_of(name, entry, dtypes), named)
    model.tie_weights()
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise UserError(f"{named}: its weights do not fit its config.json: {len(empty)} missing, first {empty[0]}")
    model.eval()
    return model


def copy_beside(source: Path, target: Path) -> None:
    """Copies what belongs to a model beside its weights, unless it is there."""
    found = {file.name: file for pattern in _BESIDE for file in sorted(source.glob(pattern)) if file.is_file()}
    for name, file in found.items():
        if name not in _INDICES and not (target / name).exists():
            shutil.copyfile(file, target / name)


def _plain(source: Path, named: str, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """Tensor -> what reads it. The files are mapped, not read."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in weight_files(source, named):
        if file.suffix == ".bin":
            # a copy of its own: entries of a pickle may share memory, which safetensors refuses
            found |= {name: tensor.clone for name, tensor in pickled(file, named).items()}
            continue
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{named}: {file.name} is corrupt: {one_line(error)}") from None
        found |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
    return found


def _got(read: Callable[[], Tensor], name: str, named: str) -> Tensor:
    try:
        return read()
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{named}: {name} cannot be read: {one_line(error)}") from None


def _blocks(names: Mapping[str, Any]) -> list[list[str]]:
    """The names by decoder block, what is in none first; sorted, so that equal models make equal files."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        groups.setdefault((match[1], int(match[2])) if match else ("", -1), []).append(name)
    return [sorted(groups[key]) for key in sorted(groups)]


def _is_linear(name: str, entry: Entry) -> bool:
    """Whether this is the weight of a linear layer inside a decoder block."""
    dimensions = entry.ndim if isinstance(entry, Tensor) else 2
    return dimensions == 2 and name.endswith(".weight") and _BLOCK.match(name) is not None


def _packed(name: str, weight: Tensor, ready: Matrix | None, drop_negative_zeros: bool) -> Entry:
    """What is stored for a tensor: a matrix where it is smaller."""
    if not _is_linear(name, weight) or weight.dtype not in container.VALUES:
        return weight
    if ready is not None and _same_bits(ready.dense().to(weight.dtype), weight):
        return ready
    kept = weight != 0 if drop_negative_zeros else bits_of(weight) != 0
    bits = 8 * weight.element_size()
    if int(torch.count_nonzero(kept)) >= weight.numel() * (1 - 1 / bits):  # a bit per entry takes what is gained
        return weight
    matrix = compress(weight, kept)
    return matrix if container.stored_bytes(matrix) < container.stored_bytes(weight) else weight


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(bits_of(one.contiguous()), bits_of(other.contiguous()))


def _negative_zeros(entry: Entry) -> int:
    """Negative zeros among the values of a matrix, which may be stored densely because of them."""
    if isinstance(entry, GroupQuantised) or (isinstance(entry, Tensor) and entry.ndim != 2):
        return 0
    values = entry if isinstance(entry, Tensor) else entry.stored
    return int(torch.signbit(values[values == 0]).sum())


def _module(model: nn.Module, path: str, named: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(f"{named}: the model of its config.json has no {path}; export it to a plain folder") from None


def _fits(name: str, shape: tuple[int, ...], wanted: Tensor, named: str) -> None:
    if shape != tuple(wanted.shape):
        raise UserError(f"{named}: {name} is {shape}, its config.json says {tuple(wanted.shape)}")


def _fill(model: nn.Module, name: str, tensor: Tensor, named: str) -> None:
    """Puts a tensor in the place of an empty parameter or a buffer."""
    path, _, leaf = name.rpartition(".")
    module = _module(model, path, named)
    old = getattr(module, leaf, None)
    if not isinstance(old, Tensor):
        raise UserError(f"{named}: the model of its config.json has no {name}; export it to a plain folder")
    _fits(name, tuple(tensor.shape), old, named)
    parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)


def _write_json(content: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
