"""``streamed=true``: a model that is never in memory as a whole, for pruning what does not fit there.

The model is made without values (meta device). Its tensors are read from safetensors a part at a time: a decoder
block, what stands in front of and behind the blocks, the output head if it is its own. A part is freed when another is
brought. A block that a walk is done with is written as a shard of the new model and read from there ever after, so
that what remains in memory is one block, its statistics and the hidden states (which ``activations=disk`` keeps in
files). Everything is computed as for a model in memory, in the same order: results are the same bit for bit.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import swap_tensors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sparsebench.errors import UserError
from sparsebench.models.base import LoadedModel
from sparsebench.models.blocks import Blocks, Groups, capture
from sparsebench.models.content import check_layers, is_compressed, weight_files
from sparsebench.models.outliers import inject_block
from sparsebench.models.saving import drafted, write_notes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from sparsebench.models.loading import How

Part = int | str  # the index of a block, "front" or "head"


class Checkpoint:
    """The tensors in the safetensors files of a Hugging Face folder, read one at a time.

    UserError naming ``named`` when they are in another format."""

    def __init__(self, folder: Path, named: str) -> None:
        files = weight_files(folder, named)
        if is_compressed(folder):
            raise UserError(f"streamed=true: {named} is compressed; `export` makes it plain again")
        if any(file.suffix != ".safetensors" for file in files):
            raise UserError(f"streamed=true: {named} has no safetensors files, only {files[0].name}")
        self.named = named
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for file in files:
            with safe_open(file, "pt") as found:
                for name in found.keys():  # noqa: SIM118 (no mapping)
                    self.files[name], self.shapes[name] = file, found.get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU."""
        with safe_open(self.files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def dtype(self) -> torch.dtype:
        """The number format of the first tensor that has one with a fraction."""
        for name in self.files:
            with safe_open(self.files[name], "pt") as file:
                kind = file.get_slice(name)[:0].dtype
            if kind.is_floating_point:
                return kind  # type: ignore[no-any-return]
        return torch.float32


class OnDisk:
    """Tensors in files of a new folder, mapped when they are asked for: ``Groups`` that take no memory. The folder goes
    when nobody has the object any more."""

    def __init__(self, folder: Path, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self.folder, self.device, self.forms = folder, device, list[tuple[torch.Size, torch.dtype]]()
        folder.mkdir(parents=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for place, tensor in enumerate(tensors):
            self.forms.append((tensor.shape, tensor.dtype))
            self[place] = tensor

    def __len__(self) -> int:
        return len(self.forms)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int, /) -> Tensor:
        shape, dtype = self.forms[range(len(self.forms))[place]]  # IndexError as in a list
        return torch.from_file(str(self._file(place)), size=shape.numel(), dtype=dtype).view(shape).to(self.device)

    def __setitem__(self, place: int, tensor: Tensor, /) -> None:
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
        fresh = self._file(place).with_suffix(".new")  # whoever still has the old tensor has its file mapped
        data.numpy().tofile(fresh)
        fresh.replace(self._file(place))

    def _file(self, place: int) -> Path:
        return self.folder / f"{place}.bin"


class Draft:
    """The folder that becomes ``final`` when it is kept; it is made when it is first asked for."""

    def __init__(self, final: Path) -> None:
        self.final, self._stack = final, ExitStack()
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = self._stack.enter_context(drafted(self.final))
        return self._folder

    def keep(self) -> None:
        self._stack.close()
        self._folder = self.final

    def discard(self) -> None:
        self._stack.__exit__(_Dropped, _Dropped(), None)


class _Dropped(Exception):
    """Ends a draft that nobody wants."""


class StreamedBlocks(Blocks):
    """The blocks of a model without values, one part of it in memory at a time.

    ``draft``: where the new model is written; ``on_disk``: hidden states are kept in files beside it;
    ``outliers_sigma``: of the outliers that every block is given as it is read, or None."""

    def __init__(
        self,
        model: PreTrainedModel,
        source: Checkpoint,
        device: torch.device,
        draft: Draft,
        on_disk: bool,
        outliers_sigma: float | None,
    ) -> None:
        super().__init__(model)
        self.source, self.place, self.draft, self.on_disk = source, device, draft, on_disk
        self.outliers_sigma = outliers_sigma
        self.written: dict[Part, str] = {}  # the shard that holds the part
        self.here: set[Part] = set()
        self.aliases = _aliases(model)
        head = model.get_output_embeddings()
        self.head = next((name for name, module in model.named_modules() if module is head), None)
        self.first_name = {alias: name for name, names in self.aliases.items() for alias in names}
        self.part_of = {name: self._part(names) for name, names in self.aliases.items()}
        self.parts: list[Part] = [*dict.fromkeys(["front", *range(len(self)), *self.part_of.values()])]
        self.stored = {name: self._stored(name, names) for name, names in self.aliases.items()}

    def _part(self, names: list[str]) -> Part:
        """Which part a tensor with these names belongs to. UserError when blocks share it."""
        found: set[Part] = set()
        for name in names:
            if name.startswith(f"{self.prefix}."):
                found.add(int(name.removeprefix(f"{self.prefix}.").partition(".")[0]))
            else:
                found.add("head" if self.head and name.startswith(f"{self.head}.") else "front")
        if found == {"head", "front"}:  # tied
            return "front"
        if len(found) > 1:
            raise UserError(f"streamed=true: {self.source.named}: {names[0]} and {names[1]} are one tensor")
        return found.pop()

    def _stored(self, name: str, names: list[str]) -> str:
        """The tensor's name in the files. UserError when it is not there, or of another shape."""
        found = next((one for one in names if one in self.source.files), None)
        if found is None:
            raise UserError(f"streamed=true: {self.source.named}: its files have no {name} (other names, or none)")
        if self.source.shapes[found] != list(self._tensor(name).shape):
            raise UserError(f"{self.source.named}: its weights do not fit its config.json: mismatched {name}")
        return found

    def _tensor(self, name: str) -> Tensor:
        """The parameter or buffer as it is now, with or without values."""
        owner, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return found

    def _put(self, name: str, tensor: Tensor) -> None:
        """Gives a parameter or a buffer other values (or none). A parameter stays the same object, under all its names:
        whoever goes through the model knows by that what it has seen."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if (parameter := module._parameters.get(leaf)) is not None:
            swap_tensors(parameter, nn.Parameter(tensor, requires_grad=False))
        elif not tensor.is_meta:  # buffers are small: they stay
            module._buffers[leaf] = tensor

    def read(self, name: str) -> Tensor:
        """The values of a tensor as they are stored by now: a copy on the device, in the model's number format."""
        part, wanted = self.part_of[name], self._tensor(name)
        if part in self.written:
            with safe_open(self.draft.folder / self.written[part], "pt") as file:
                return file.get_tensor(name).to(self.place, copy=True)  # type: ignore[no-any-return]
        return self.source.read(self.stored[name]).to(self.place, wanted.dtype, copy=True)

    def _bring(self, *parts: Part) -> None:
        for part in self.here - set(parts):
            for name in self._names(part):
                self._put(name, torch.empty_like(self._tensor(name), device="meta"))
            self.here.remove(part)
            _give_back()
        for part in [part for part in parts if part not in self.here]:
            for name in self._names(part):
                self._put(name, self.read(name))
            self.here.add(part)
            if isinstance(part, int) and part not in self.written and self.outliers_sigma is not None:
                inject_block(self.model, part, self.outliers_sigma)  # type: ignore[arg-type]

    def _names(self, part: Part) -> list[str]:
        return [name for name, its in self.part_of.items() if its == part]

    @property
    def device(self) -> torch.device:
        return self.place

    def bring_front(self) -> None:
        self._bring("front")

    def bring_ends(self) -> None:
        """What stands in front of and behind the blocks, in memory until a block is brought."""
        self._bring("front", *(["head"] if "head" in self.parts else []))

    def bring(self, index: int) -> nn.Module:
        self._bring(index)
        return self.modules[index]

    def done(self, index: int) -> None:
        self._write(index)

    def hold(self, hidden: Iterable[Tensor]) -> Groups:
        if not self.on_disk:
            return list(hidden)
        final = self.draft.final.absolute()
        return OnDisk(final.with_name(f".{final.name}.hidden.{uuid4().hex[:12]}"), self.place, hidden)

    @contextmanager
    def passing(self, hidden: Tensor, *, tuples: bool) -> Iterator[None]:
        """Inside, the blocks do nothing, and the last one puts out ``hidden``; ``tuples``: as ``BlockCalls`` says."""

        def standing_for(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = args[0] if args else kwargs["hidden_states"]
                output = hidden if index + 1 == len(self) else given
                return (output,) if tuples else output

            return forward

        with ExitStack() as stack:
            for index, block in enumerate(self.modules):
                stack.callback(vars(block).pop, "forward")
                block.forward = standing_for(index)
            yield

    def _write(self, part: Part) -> None:
        self._bring(part)
        shard = f"model-{self.parts.index(part) + 1:05d}-of-{len(self.parts):05d}.safetensors"
        tensors = {name: self._tensor(name).detach().cpu().contiguous() for name in self._names(part)}
        save_file(tensors, self.draft.folder / shard, metadata={"format": "pt"})
        self.written[part] = shard

    def write_rest(self) -> None:
        """Writes the parts that no walk was done with, and the index of all."""
        for part in self.parts:
            if part not in self.written:
                self._write(part)
        where = {name: self.written[part] for name, part in sorted(self.part_of.items())}
        size = sum(one.numel() * one.element_size() for one in map(self._tensor, where))
        index = {"metadata": {"total_size": size}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.draft.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@dataclass
class StreamedModel(LoadedModel):
    """A model whose decoder blocks are in memory one at a time, and which is written to a folder while it is pruned.

    All of the folder appears when ``keep`` is called; ``discard`` drops what was written of it."""

    streamed: StreamedBlocks

    @property
    def device(self) -> torch.device:
        return self.streamed.device

    def blocks(self) -> StreamedBlocks:
        return self.streamed

    def values(self, name: str, parameter: nn.Parameter) -> Tensor:
        name = self.streamed.first_name[name]
        part = self.streamed.part_of[name]
        if not isinstance(part, int):
            return self.streamed.read(name)
        self.streamed.bring(part)
        return self.model.get_parameter(name).detach()

    @torch.no_grad()
    def logits(self, ids: Tensor, rows: int) -> Iterator[Tensor]:
        """All rows go through a block before the next one is brought."""
        blocks = self.streamed
        inputs = capture(blocks, ids, rows)
        for index in range(len(blocks)):
            inputs.advance(index, blocks.bring(index))
        blocks.bring_ends()
        for place, group in enumerate(ids.split(rows)):
            with blocks.passing(inputs.hidden[place], tuples=inputs.calls[place].tuples):
                found: Tensor = self.model(input_ids=group.to(self.device), use_cache=False).logits
            yield found

    def keep(self, notes: dict[str, Any]) -> None:
        """Completes the folder: the other weights, configuration, tokenizer, and ``notes`` as ``save_model``."""
        model, folder = self.model, self.streamed.draft.folder
        self.streamed.write_rest()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_notes(notes, folder)
        self.streamed.draft.keep()

    def discard(self) -> None:
        self.streamed.draft.discard()


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Parameters and the buffers that are saved: the first name of each -> all its names."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    found = {names[0]: names for names in by_identity.values()}
    known = {name for names in found.values() for name in names}
    return found | {name: [name] for name in model.state_dict() if name not in known}


def _give_back() -> None:
    """Has the C library return freed memory to the system. Left to itself glibc keeps most of what a block leaves, in
    pieces that do not fit the next one, so that the process grows with every block."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # not musl
        libc.malloc_trim(0)


def open_streamed(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: Any,
    context: int,
    how: How,
    device: torch.device,
    save: Path,
    on_disk: bool,
) -> StreamedModel:
    """A model whose weights stay in ``folder``, to be pruned into ``save``. UserError when it cannot be streamed."""
    if how.device_map is not None:
        raise UserError(f"model.device_map={how.device_map}: spreads a whole model; it does not go with streamed=true")
    source = Checkpoint(folder, how.named)
    asked = getattr(torch, how.dtype) if how.dtype != "auto" else config.dtype or source.dtype()
    loader: Any = AutoModelForCausalLM
    extra = {"attn_implementation": how.attn_implementation} if how.attn_implementation else {}
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = loader.from_config(
            config, dtype=asked, trust_remote_code=how.trust_remote_code, **extra
        )
    model.tie_weights()
    model.eval()
    used = model.state_dict()
    ignored = model._keys_to_ignore_on_load_unexpected or ()  # no public name; what from_pretrained drops, too
    unused = [one for one in source.files if one not in used and not any(re.search(each, one) for each in ignored)]
    check_layers(unused, used, how.named)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for option in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if getattr(model, option, None) and asked != torch.float32:
            raise UserError(f"streamed=true: {type(model).__name__} keeps parts in float32; use model.dtype=float32")
    blocks = StreamedBlocks(model, source, device, Draft(save), on_disk, how.outliers_sigma)
    blocks.bring(0)  # whether it can be given outliers shows on the block
    return StreamedModel(model, tokenizer, how.name, context, blocks)
