"""The verb ``export``: a model folder compressed, or a compressed one as a plain Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sparsebench.errors import UserError
from sparsebench.models.content import is_compressed, read_json, weight_files
from sparsebench.models.saving import NOTES, check_folder, drafted, write_notes

_CHOICES = {"form": ("plain", "compressed"), "format": ("table", "json"), "negative_zeros": ("keep", "drop")}


def run(names: Sequence[str], given: dict[str, str]) -> str:
    """``export <folder> to=<new folder> [form=plain|compressed] [negative_zeros=keep|drop] [format=table|json]``.

    The sizes as text. ``form``: the other one of what the folder is; ``negative_zeros=drop`` writes -0.0 as plain
    zeros, which changes no sum and makes a model that was pruned by multiplying with its mask smaller. UserError on bad
    input, also when the folder is damaged; the new folder then is not there.
    """
    if len(names) != 1:
        raise UserError("export: name one model folder: export <folder> to=<new folder>")
    unknown = given.keys() - {"to", *_CHOICES}
    if unknown:
        raise UserError(f"{min(unknown)}: unknown option of export; valid: to, {', '.join(_CHOICES)}")
    for key, valid in _CHOICES.items():
        if given.get(key, valid[0]) not in valid:
            raise UserError(f"{key}={given[key]}: valid: {', '.join(valid)}")
    if not given.get("to"):
        raise UserError("to=: needed; a new folder")
    source, target = Path(names[0]).expanduser(), Path(given["to"]).expanduser()
    named = f"export {names[0]}"
    weight_files(source, named)
    check_folder(target, "to")
    form = given.get("form", "plain" if is_compressed(source) else "compressed")
    if (form == "compressed") == is_compressed(source):
        raise UserError(f"form={form}: {source} is {form} already")
    drop = given.get("negative_zeros") == "drop"
    if drop and form == "plain":
        raise UserError("negative_zeros=drop: goes with form=compressed alone")
    return _export(source, target, named, form, drop, given.get("format", "table"))


def _export(source: Path, target: Path, named: str, form: str, drop: bool, format: str) -> str:
    from sparsebench.models.compressed import compress_folder, unpack_folder

    notes = read_json(source / NOTES, named) if (source / NOTES).is_file() else {}
    notes.pop("size", None)
    with drafted(target, "to") as draft:
        if form == "compressed":
            sizes = compress_folder(source, draft, named, drop_negative_zeros=drop)
            notes["size"] = sizes.row()
        else:
            sizes = unpack_folder(source, draft, named)
        if notes:
            write_notes(notes, draft)
    if format == "json":
        return json.dumps({"folder": str(target), "form": form, **sizes.row()}, indent=2) + "\n"
    return f"{form} in {target}\n{sizes.text()}"
