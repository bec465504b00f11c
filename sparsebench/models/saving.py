"""``save=<folder>``: the sparse model as a plain Hugging Face folder that any other tool loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sparsebench.errors import UserError
from sparsebench.models.loading import quiet

if TYPE_CHECKING:  # imports torch
    from torch import Tensor

    from sparsebench.models.base import LoadedModel

NOTES = "sparsebench.json"


def check_folder(folder: Path) -> None:
    """UserError naming ``save`` unless ``folder`` is new or an empty folder. Cheap: call it before a run."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"save={folder}: the folder exists and is not empty; give a new one")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"save={folder}: exists and is not a folder; give a new one")


def save_model(
    loaded: LoadedModel,
    folder: Path,
    notes: dict[str, Any],
    fitted: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes weights (safetensors, in their dtype), configuration, tokenizer and ``sparsebench.json``.

    ``notes``: how the model was made, JSON types only. ``fitted``: by method, what it learned from calibration
    data and acts by while the model runs, one file ``sparsebench-<method>.safetensors`` each. All of it appears
    at once, or nothing does: it is written beside the folder and then renamed. UserError naming ``save`` when
    the folder exists and is not empty, or cannot be written.
    """
    text = json.dumps(notes, indent=2, sort_keys=True) + "\n"
    check_folder(folder)
    draft = folder.absolute().with_name(f".{folder.absolute().name}.{uuid4().hex[:12]}")
    try:
        draft.mkdir(parents=True)
        with quiet():
            loaded.model.save_pretrained(draft)
        loaded.tokenizer.save_pretrained(draft)
        (draft / NOTES).write_text(text, encoding="utf-8")
        for method, tensors in (fitted or {}).items():
            if tensors:
                _write(tensors, draft / f"sparsebench-{method}.safetensors")
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails; not every system renames over an empty folder
        draft.rename(folder)
    except OSError as error:
        raise UserError(f"save={folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already when it was renamed


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, file)
