"""What identifies a model's weights in a run id. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsebench.errors import UserError

# Beside the weights, the files of a model folder that can change what it computes.
_ALSO_HASHED = (
    "config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt special_tokens_map.json"
).split()
COMPRESSED = "compressed.safetensors.index.json"  # the index of compressed weights
# What a load reads, in the order in which transformers looks for it; compressed weights last.
_WEIGHTS = "model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json".split()
_WEIGHTS.append(COMPRESSED)


def one_line(error: BaseException, most: int = 200) -> str:
    """The error's text, or its class where that says nothing, on one line of at most ``most`` characters."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError):  # whose text is the key alone
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= most else text[: most - 3] + "..."


def weights_content(folder: Path, named: str | None = None) -> str:
    """sha256 (hex) over sorted names and bytes of the weight files, the configuration, the tokenizer and
    any Python files of a Hugging Face folder. The bytes are hashed as they lie there: the same weights in a
    plain and in a compressed folder are two contents.

    ``named``: the option and its value for messages. UserError when the folder, its config.json or its
    weights are missing, or cannot be read.
    """
    named = named or f"model.path={folder}"
    files = [*weight_files(folder, named), *folder.glob("*.py")]
    files += [folder / name for name in _ALSO_HASHED if (folder / name).is_file()]
    total = hashlib.sha256()
    try:
        for file in sorted(files, key=lambda one: one.name):
            if file.suffix == ".safetensors":
                _check_safetensors(file, named)
            state = file.stat()
            total.update(f"{file.name}\n{_digest(file, state.st_size, state.st_mtime_ns)}\n".encode())
    except OSError as error:
        raise UserError(f"{named}: cannot be read: {one_line(error)}") from None
    return total.hexdigest()


def weight_files(folder: Path, named: str) -> list[Path]:
    """The weight files that loading ``folder`` reads, every shard of them. UserError as ``weights_content``."""
    if not folder.is_dir():
        raise UserError(f"{named}: no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{named}: the folder holds no config.json, so it is not a Hugging Face model")
    read_json(folder / "config.json", named)
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{named}: the folder holds no weights; looked for {', '.join(_WEIGHTS)}")
    files = shards(found, named)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{named}: {found.name} names shards that are missing: {', '.join(missing)}")
    return files


def is_compressed(folder: Path) -> bool:
    """Whether what a load of ``folder`` reads are compressed weights (``models.compressed``)."""
    return next((name for name in _WEIGHTS if (folder / name).is_file()), None) == COMPRESSED


def shards(file: Path, named: str) -> list[Path]:
    """``file`` itself, or the sorted shards that it lists where it is an index."""
    if file.suffix != ".json":
        return [file]
    listed = read_json(file, named).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{named}: {file.name} is corrupt: it has no weight_map")
    names = sorted({str(name) for name in listed.values()})
    if any(Path(name).name != name for name in names):
        raise UserError(f"{named}: {file.name} names shards outside the folder")
    return [file.with_name(name) for name in names]


def read_json(file: Path, named: str) -> dict[str, Any]:
    """The object in a JSON file. UserError when it is corrupt."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: {file.name} is corrupt: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{named}: {file.name} is corrupt: it holds no JSON object")
    return found


def _check_safetensors(file: Path, named: str) -> None:
    """Opening checks the header and that the file is as long as its header says: cheap, also for 100 GB."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(f"{named}: {file.name} is corrupt: {one_line(error)}") from None


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file; size and time are only the cache's key, so that a changed file is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hub_content(path: str, revision: str | None) -> str:
    """The commit (40 hex digits) that ``revision`` of the hub model ``path`` stands for.

    A commit in the local hub cache answers first, with no network: a run id then does not change when
    the hub's main branch does (name a ``revision`` for a newer one). UserError when the hub has no such
    model or revision, refuses access, or cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        commit = HfApi().model_info(path, revision=revision, timeout=15).sha
    except (HTTPError, OSError, HFValidationError) as error:
        raise hub_error(path, revision, error) from None
    if commit is None:
        raise UserError(f"model.path={path}: the hub gives no commit for it")
    return commit


def hub_error(path: str, revision: str | None, error: Exception) -> UserError:
    """The one line that says what the hub refused and what to do about it."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    if isinstance(error, errors.HFValidationError):
        return UserError(f"model.path={path}: no such folder, and not a hub name (owner/name)")
    if isinstance(error, errors.GatedRepoError):
        why = "gated: accept its licence on the hub, then log in with `hf auth login` or set HF_TOKEN"
        return UserError(f"model.path={path}: the model is {why}")
    if isinstance(error, errors.RepositoryNotFoundError):
        why = "the hub has no such model (or it is private: log in with `hf auth login`)"
        return UserError(f"model.path={path}: no such folder, and {why}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"model.revision={revision}: the hub's {path} has no such branch, tag or commit")
    why = f"the hub cannot be reached ({one_line(cause or error, 120)})"
    return UserError(f"model.path={path}: no such folder, not in the hub cache, and {why}")


def check_layers(unused: Iterable[str], used: Iterable[str], named: str) -> None:
    """UserError when the files hold more layers than the config, which transformers would drop without a word:
    tensors that are not ``used``, but are called like one that is, up to a number."""
    known = {re.sub(r"\d+", "#", name) for name in used}
    more = sorted(name for name in unused if re.sub(r"\d+", "#", name) in known)
    if more:
        raise UserError(f"{named}: its weights do not fit its config.json: {len(more)} too many, first {more[0]}")
