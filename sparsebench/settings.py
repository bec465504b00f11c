"""Settings beside the runs, chosen by name: ``cluster=slurm cluster.gpus=1``, ``tracking=wandb tracking.mode=online``.

They never enter a run's id. ``conf/<group>/<name>.yaml`` (a user's folder before the project's) holds what differs
from the declared defaults, and which kind of backend the name stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.config import parse_values
from sparsebench.declare import Declared, options_of
from sparsebench.errors import UserError, closest
from sparsebench.paths import data_folder


@dataclass(frozen=True)
class Group:
    """One group of settings. ``kind``: the key of its YAML files that names the backend; ``kinds``: the valid ones."""

    name: str
    kind: str
    kinds: tuple[str, ...]
    options: type[Declared]

    def owns(self, word: str) -> bool:
        """Whether the word ``key=value`` belongs to this group."""
        key = word.partition("=")[0]
        return key == self.name or key.startswith(f"{self.name}.")

    def chosen(self, words: Sequence[str], default: str, config_dir: Path | None) -> tuple[str, Any]:
        """The backend and its options, from the words that the group owns. UserError naming what is wrong."""
        given: dict[str, Any] = {}
        for key, values in parse_values([word for word in words if self.owns(word)]).items():
            if len(values) != 1:
                raise UserError(f"{key}: takes one value")
            given[key] = values[0]
        kind, settings = self._file(str(given.pop(self.name, default)), config_dir)
        valid, found = options_of(self.options), {}
        for key, value in (settings | given).items():
            option = key.removeprefix(f"{self.name}.")
            if option not in valid:
                raise UserError(f"{key}: unknown option of {self.name}{closest(option, valid)}")
            found[option] = valid[option].check(key, value)
        return kind, self.options(**found)

    def _file(self, name: str, config_dir: Path | None) -> tuple[str, dict[str, Any]]:
        """The backend and the options that ``<group>/<name>.yaml`` names."""
        import yaml

        known: dict[str, Path] = {}
        for folder in (data_folder("conf"), *([config_dir] if config_dir else [])):
            known |= {file.stem: file for file in sorted((folder / self.name).glob("*.yaml"))}
        if name not in known:
            raise UserError(f"{self.name}={name}: unknown {self.kind}{closest(name, known)}")
        try:
            content = yaml.safe_load(known[name].read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{known[name]}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise UserError(f"{known[name]}: holds `{self.kind}:` and options of {self.name}, one a line")
        kind = str(content.pop(self.kind, name))
        if kind not in self.kinds:
            raise UserError(f"{known[name]}: {self.kind}: {kind}: unknown {self.kind}{closest(kind, self.kinds)}")
        return kind, {f"{self.name}.{key}": value for key, value in content.items()}
