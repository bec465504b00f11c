"""``save=<folder>``: the sparse model as a Hugging Face folder that any other tool loads, or as a compressed one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sparsebench.errors import UserError
from sparsebench.models.loading import quiet

if TYPE_CHECKING:  # imports torch
    from torch import Tensor

    from sparsebench.models.base import LoadedModel
    from sparsebench.models.compressed import Sizes

NOTES = "sparsebench.json"


def check_folder(folder: Path, option: str = "save") -> None:
    """UserError naming ``option`` unless ``folder`` is new or an empty folder, and can be made. Cheap: call it before a
    run."""
    try:
        _check_new(folder, option)
        above = next(one for one in folder.absolute().parents if one.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=above))  # what a system allows, only trying tells
    except OSError as error:
        raise UserError(f"{option}={folder}: cannot be written: {error.strerror}") from None


def _check_new(folder: Path, option: str) -> None:
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"{option}={folder}: the folder exists and is not empty; give a new one")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{option}={folder}: exists and is not a folder; give a new one")


@contextmanager
def drafted(folder: Path, option: str = "save") -> Iterator[Path]:
    """A folder to write to, beside ``folder``, which it becomes when the block ends well: all of it appears at once,
    or nothing does. UserError naming ``option`` when ``folder`` is not empty, or cannot be written."""
    from safetensors import SafetensorError

    draft = folder.absolute().with_name(f".{folder.absolute().name}.{uuid4().hex[:12]}")
    try:
        _check_new(folder, option)
        draft.mkdir(parents=True)
        yield draft
        mode = draft.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
        for file in draft.iterdir():
            if file.is_file():
                file.chmod(mode)
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails; not every system renames over an empty folder
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{option}={folder}: cannot be written: {why}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already when it was renamed


def save_model(
    loaded: LoadedModel,
    folder: Path,
    notes: dict[str, Any],
    fitted: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes weights (safetensors, in their dtype), configuration, tokenizer and ``sparsebench.json``.

    ``notes``: how the model was made, JSON types only. ``fitted``: by method, what it learned from calibration
    data and acts by while the model runs, one file ``sparsebench-<method>.safetensors`` each. UserError as
    ``drafted``.
    """
    with drafted(folder) as draft:
        _write_model(loaded, draft, fitted or {})
        write_notes(notes, draft)


def save_compressed(
    loaded: LoadedModel,
    folder: Path,
    notes: dict[str, Any],
    fitted: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Sizes:
    """As ``save_model``, the weights compressed (``compressed``); the sizes are added to the notes as ``size``.

    A module whose weight a method left in a format of the kernels (``kernels.stored``) is stored so, as long as that is
    its weight bit for bit. The weights go through a plain folder beside
    the new one, so that their names are the ones that transformers writes.
    """
    from sparsebench.kernels.stored import stored_matrix
    from sparsebench.models.compressed import compress_folder

    matrices = ((name, stored_matrix(module)) for name, module in loaded.model.named_modules())
    packed = {f"{name}.weight": matrix for name, matrix in matrices if matrix is not None}
    with drafted(folder) as draft:
        plain = draft / "plain"
        plain.mkdir()
        _write_model(loaded, plain, fitted or {})
        sizes = compress_folder(plain, draft, f"save={folder}", packed=packed)
        shutil.rmtree(plain)
        write_notes({**notes, "size": sizes.row()}, draft)
    return sizes


def write_notes(notes: Mapping[str, Any], folder: Path) -> None:
    """``sparsebench.json``."""
    (folder / NOTES).write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_model(loaded: LoadedModel, folder: Path, fitted: Mapping[str, Mapping[str, Tensor]]) -> None:
    """All but the notes."""
    with quiet():
        loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    for method, tensors in fitted.items():
        if tensors:
            _write(tensors, folder / f"sparsebench-{method}.safetensors")


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, file)
