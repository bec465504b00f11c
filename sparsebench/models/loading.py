"""Models from anywhere: a name on the Hugging Face hub, or a folder in its format."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.declare import Declared, model, option
from sparsebench.errors import UserError
from sparsebench.models.content import (
    COMPRESSED,
    check_layers,
    hub_content,
    hub_error,
    is_compressed,
    one_line,
    shards,
    weight_files,
    weights_content,
)

if TYPE_CHECKING:  # torch and transformers are imported by load() alone: content() answers without them
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sparsebench.models.base import LoadedModel

# What the libraries raise on a damaged or unknown file.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError)


@model(name="hf", version=1, calibration="c4")
@dataclass(frozen=True)
class HuggingFace(Declared):
    """A causal language model from the Hugging Face hub or a local folder."""

    path: str | None = option(None, "a hub name (owner/name) or a folder in Hugging Face format; required")
    revision: str | None = option(None, "branch, tag or commit on the hub; none: the cached commit, else main")
    dtype: str = option(
        "auto", "number format of the weights; auto: as saved", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = option("auto", "cpu, cuda, cuda:N or mps; auto: cuda where there is one, else cpu")
    device_map: str | None = option(
        None,
        "spread the model over the devices (needs accelerate)",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
    )
    trust_remote_code: bool = option(False, "run the Python code that comes with the model")
    attn_implementation: str | None = option(
        None,
        "attention kernel; none: the library's choice",
        choices=("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
    )
    context: int | None = option(None, "most positions to use; none: as the model's config says", low=1, unit="tokens")
    outliers: bool = option(False, "give the model outlier features without changing its function")
    outliers_sigma: float = option(
        1.0, "spread of the outlier scales: log scale ~ N(0, sigma)", low=0.0, high=4.0, only="outliers=true"
    )

    def content(self) -> str:
        """sha256 of a folder's files, or the commit on the hub. UserError naming ``model.path``."""
        folder = self._folder()
        if folder is not None:
            return weights_content(folder, f"model.path={self.path}")
        return hub_content(str(self.path), self.revision)

    def load(self) -> LoadedModel:
        """The model in evaluation mode on its device. UserError naming the option that is wrong."""
        return load_folder(*self.source())

    def source(self) -> tuple[Path, How]:
        """Its folder (downloaded where it has none) and how to load it. UserError as ``load``."""
        if self.device_map is not None and self.device != "auto":
            raise UserError(f"model.device_map={self.device_map}: contradicts model.device={self.device}; give one")
        how = How(
            named=f"model.path={self.path}",
            name=str(self.path),
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
            context=self.context,
            outliers_sigma=self.outliers_sigma if self.outliers else None,
        )
        choose_device(self.device)  # before anything is downloaded
        folder = self._folder()
        if folder is None:
            # pinned to the commit in the run id, so that what is loaded is what was hashed
            folder = download(str(self.path), self.content(), self.trust_remote_code)
        return folder, how

    def _folder(self) -> Path | None:
        """The local folder that ``path`` names; None when only the hub can know it."""
        if not self.path:
            raise UserError(f"model.path={self.path}: needed; a hub name (owner/name) or a folder")
        folder = Path(self.path).expanduser()
        if folder.exists():
            if self.revision is not None:
                raise UserError(
                    f"model.revision={self.revision}: model.path={self.path} is a folder, without revisions"
                )
            return folder
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.path, re.ASCII):
            raise UserError(f"model.path={self.path}: no such folder, and not a hub name (owner/name)")
        return None


@dataclass(frozen=True)
class How:
    """How to load a folder. ``named``: option and value that messages start with; ``outliers_sigma``: None
    for the weights as they are. The rest as in ``HuggingFace``."""

    named: str
    name: str
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    context: int | None = None
    outliers_sigma: float | None = None


def choose_device(device: str) -> torch.device:
    """The device that ``model.device`` means on this machine. UserError when it is not there."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    valid = "valid: auto, cpu, cuda, cuda:N, mps"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"model.device={device}: not a device; {valid}") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"model.device={device}: not a device that models run on; {valid}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device={device}: this machine or this build of torch has no CUDA; use cpu or auto")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"model.device={device}: there are only {torch.cuda.device_count()} CUDA devices here")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"model.device={device}: this machine or this build of torch has no MPS; use cpu or auto")
    return chosen


def download(path: str, commit: str, code: bool) -> Path:
    """The local folder with one commit of a hub model: configuration, tokenizer, weights and, with
    ``code``, its Python files. UserError naming ``model.path`` when the hub does not give it.

    Only the files that a load reads: repositories often hold the weights a second time (consolidated,
    original/, other frameworks).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # it warns that nothing matched when a repository has .bin files alone
    small = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", *(["*.py"] if code else [])]
    try:
        folder = Path(snapshot_download(path, revision=commit, allow_patterns=small, ignore_patterns=["*/*"]))
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
            (COMPRESSED, COMPRESSED),
        ):
            wanted = [single]
            if (folder / index).is_file():
                wanted = [file.name for file in shards(folder / index, f"model.path={path}")]
            snapshot_download(path, revision=commit, allow_patterns=wanted)
            if any((folder / name).is_file() for name in wanted):
                break
    except (HTTPError, OSError) as error:
        raise hub_error(path, commit, error) from None
    finally:
        hub_logging.set_verbosity(level)
    return folder


def load_folder(folder: Path, how: How) -> LoadedModel:
    """The model and tokenizer in a Hugging Face folder, in evaluation mode on their device.

    Weights come from safetensors, or from ``.bin`` files through ``weights_only=True``: a pickle that
    carries code is refused. UserError when something is missing, corrupt or not possible here.
    """
    from sparsebench.models.base import LoadedModel
    from sparsebench.models.outliers import inject_outliers

    device = choose_device(how.device)
    for file in weight_files(folder, how.named):
        if file.suffix == ".bin":
            pickled(file, how.named)
    with quiet():
        config = _config(folder, how)
        tokenizer = _tokenizer(folder, how)
        loaded = _model(folder, config, how)
    if how.outliers_sigma is not None:
        inject_outliers(loaded, how.outliers_sigma)
    if how.device_map is None:
        loaded.to(device)  # type: ignore[arg-type]
    return LoadedModel(loaded.eval(), tokenizer, how.name, how.context or _context(config, tokenizer, how))


def stream_folder(folder: Path, how: How, save: Path, on_disk: bool) -> LoadedModel:
    """The model and tokenizer of a folder without its weights, which are read a block at a time (``streaming``)."""
    from sparsebench.models.streaming import open_streamed

    device = choose_device(how.device)
    weight_files(folder, how.named)
    with quiet():
        config = _config(folder, how)
        tokenizer = _tokenizer(folder, how)
        context = how.context or _context(config, tokenizer, how)
        return open_streamed(folder, config, tokenizer, context, how, device, save, on_disk)


def pickled(file: Path, named: str) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file. UserError, beginning with ``named``, unless it is a dictionary of tensors, and
    nothing that could run. The usual (zip) format is mapped, not read."""
    import torch

    mapped = {"mmap": True} if zipfile.is_zipfile(file) else {}
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, **mapped)
    except Exception as error:  # a damaged pickle raises anything: struct.error, EOFError, RuntimeError ...
        # not torch's own text: it recommends to load the file with whatever code is in it
        why = f"is corrupt or carries code ({type(error).__name__}); only plain tensors are loaded"
        raise UserError(f"{named}: {file.name} {why}") from None
    if not isinstance(found, dict) or not all(isinstance(one, torch.Tensor) for one in found.values()):
        raise UserError(f"{named}: {file.name} is corrupt: it is not a dictionary of tensors")
    return found


def _config(folder: Path, how: How) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=how.trust_remote_code)
    except (*_DAMAGE, StrictDataclassError) as error:
        raise _refused(how, "config.json cannot be used", error) from None
    return found


def _tokenizer(folder: Path, how: How) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=how.trust_remote_code)
    # the Rust tokenizers raise bare Exception on a corrupt file
    except Exception as error:
        raise _refused(how, "its tokenizer cannot be loaded", error) from None
    return found


def _model(folder: Path, config: PreTrainedConfig, how: How) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    extra: dict[str, Any] = {"device_map": how.device_map} if how.device_map else {}
    if how.attn_implementation:
        extra["attn_implementation"] = how.attn_implementation
    loader: Any = AutoModelForCausalLM  # its annotations know nothing of output_loading_info
    place: Path | None = folder
    try:
        if is_compressed(folder):
            from sparsebench.models.compressed import dense_weights, skeleton

            # only a model's own class takes tensors in place of a folder
            loader, place = type(skeleton(config, how.trust_remote_code)), None
            extra["state_dict"] = dense_weights(folder, how.named)
        found, report = loader.from_pretrained(
            place,
            config=config,
            dtype=how.dtype,
            trust_remote_code=how.trust_remote_code,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below, all at once
            output_loading_info=True,
            **extra,
        )
        if place is None and (folder / "generation_config.json").is_file():
            found.generation_config = GenerationConfig.from_pretrained(folder)
    except (*_DAMAGE, RuntimeError, SafetensorError) as error:
        if "memory" in str(error):  # the machine's fault, not the model's
            raise
        raise _refused(how, "cannot be loaded", error) from None
    # transformers only warns, and fills with random numbers, what the files lack or have in another shape
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[problem])
        if names:
            what = problem.removesuffix("_keys")
            raise UserError(
                f"{how.named}: its weights do not fit its config.json: {len(names)} {what}, first {names[0]}"
            )
    check_layers(report["unexpected_keys"], found.state_dict(), how.named)
    return found  # type: ignore[no-any-return]


def _refused(how: How, what: str, error: Exception) -> UserError:
    """The error as one line, naming the option that can mend it."""
    text = one_line(error)
    if "trust_remote_code" in str(error):
        wish = "the model needs its own Python code; true runs it, if you trust it"
        return UserError(f"model.trust_remote_code={str(how.trust_remote_code).lower()}: {how.named}: {wish}")
    if how.device_map and "accelerate" in str(error):
        return UserError(f"model.device_map={how.device_map}: {text}")
    if how.attn_implementation and re.search(r"attn_implementation|attention|[Ff]lash", str(error)):
        return UserError(f"model.attn_implementation={how.attn_implementation}: {text}")
    return UserError(f"{how.named}: {what}: {text}")


def _context(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, how: How) -> int:
    """The positions that the model was made for, in tokens. UserError when neither config nor tokenizer says."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    # a tokenizer without a limit says 1e30
    for positions in (found, tokenizer.model_max_length):
        if isinstance(positions, int) and 0 < positions < 10**9:
            return positions
    raise UserError(f"model.context=null: {how.named} does not say for how many positions it was made; give them")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and progress bars from transformers: what its warnings say of a load is checked here."""
    from transformers.utils import logging as messages

    level, bar = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bar:
            messages.enable_progress_bar()
