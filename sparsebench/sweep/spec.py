"""A sweep file as typed data: grid, levels, exclusions, baselines, seeds, claims.

```yaml
summary: one line for `list sweeps`
paper: wanda                       # slug; claims name it
grid:                              # axes; every key that the command line knows
  model: [tiny_1m]
  model.outliers: [false, true]
  method: [magnitude, wanda, [wanda, dsnot]]      # a list in the list is a stack
  sparsity: {from: 0.1, to: 0.9, step: 0.1}       # or a list
  task: perplexity
levels: {wanda: [0.5, 0.7]}        # these methods take other levels than the axis `sparsity`
exclude:                           # points that fit one of these are left out
  - {method: magnitude, sparsity: [0.1, 0.2]}
baselines: [dense, random]         # added to the axis `method` if they are not there
seeds: [0, 1, 2]                   # for methods that use a seed
claims: []                         # sparsebench/analysis/claims.py
```

The file is composed by Hydra, so it may have a `defaults:` list. An override that names an axis
replaces it; any other override holds for all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from sparsebench.analysis.claim_list import load_claims
from sparsebench.analysis.claims import Claim
from sparsebench.config import RUN_OPTIONS, Workspace, parse_values
from sparsebench.errors import Mistakes, UserError, closest
from sparsebench.paths import data_folder

_KEYS = "summary paper grid levels exclude baselines seeds claims".split()
_RANGE = {"from", "to", "step"}
_MOST_STEPS = 10_000
# What a sweep has once, or in another way.
_NO_AXIS = {
    "seed": "is written `seeds:`",
    "store": "is given on the command line: store=<folder>",
    "format": "belongs to the verb results",
    "force": "is not an axis; failed runs are made again by retry=failed",
    "save": "is for one run: a sweep has many sparse models",
}


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was written, with the overrides applied; values are plain Python."""

    name: str
    summary: str = ""
    paper: str | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    levels: dict[str, list[float]] = field(default_factory=dict)
    exclude: list[dict[str, list[Any]]] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    claims: list[Claim] = field(default_factory=list)
    given: frozenset[str] = frozenset()  # the keys that the command line replaced or added

    @property
    def overridden(self) -> bool:
        return bool(self.given)


def folders(workspace: Workspace) -> list[Path]:
    """Where sweep files are looked for: the user's ``--config-dir`` first, then the project's."""
    own = workspace.config_dir / "sweeps" if workspace.config_dir else None
    return [*([own] if own and own.is_dir() else []), data_folder("sweeps")]


def names(workspace: Workspace) -> dict[str, Path]:
    """Sweep name -> its file."""
    found: dict[str, Path] = {}
    for folder in reversed(folders(workspace)):
        found |= {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return found


def load(workspace: Workspace, name: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of that name. Mistakes, a UserError, that lists everything wrong with its file."""
    known = names(workspace)
    if name not in known:
        raise UserError(f"sweep {name}: unknown sweep{closest(name, known)}")
    sweep = _typed(name, _composed(known[name]))
    return _overridden(sweep, overrides)


def _composed(file: Path) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with initialize_config_dir(str(file.parent.resolve()), version_base="1.3"):
            plain = OmegaConf.to_container(compose(file.stem), resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"sweep {file.stem}: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UserError(f"sweep {file.stem}: must be a mapping of {', '.join(_KEYS)}")
    return {str(key): value for key, value in plain.items()}


_Read = TypeVar("_Read")


def _typed(name: str, content: dict[str, Any]) -> Sweep:
    where = f"sweep {name}"
    errors = [f"unknown key {key}{closest(key, _KEYS)}" for key in content if key not in _KEYS]

    def part(read: Callable[[str, Any], _Read], key: str, otherwise: _Read) -> _Read:
        try:
            return read(key, content.get(key))
        except UserError as error:
            errors.extend(str(error).split("\n"))
            return otherwise

    sweep = Sweep(
        name,
        part(_text, "summary", None) or "",
        part(_text, "paper", None),
        part(_grid, "grid", {}),
        part(_levels, "levels", {}),
        part(_rules, "exclude", []),
        part(_names, "baselines", []),
        part(_seeds, "seeds", [0]),
        part(lambda key, value: load_claims(value, key), "claims", []),
    )
    if errors:
        raise Mistakes(f"{where}: {len(errors)} mistakes in its file", errors)
    return sweep


def _text(key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key}={value}: must be a text")
    return value


def _grid(key: str, value: Any) -> dict[str, list[Any]]:
    grid = _flat(_mapping(key, value))
    if not grid:
        raise UserError(f"{key}: is empty")
    for name in grid:
        check_axis(name)
    return {name: axis(name, one) for name, one in grid.items()}


def check_axis(key: str) -> None:
    """UserError for a key that a sweep has once, or in another way."""
    if key in _NO_AXIS:
        raise UserError(f"{key}: {_NO_AXIS[key]}")


def _levels(key: str, value: Any) -> dict[str, list[float]]:
    levels = {name: axis(f"{key}.{name}", one) for name, one in _mapping(key, value).items()}
    return {name: [_checked("sparsity", f"{key}.{name}", x) for x in values] for name, values in levels.items()}


def _seeds(key: str, value: Any) -> list[int]:
    return [_checked("seed", key, one) for one in axis(key, [0] if value is None else value)]


def _checked(option: str, key: str, value: Any) -> Any:
    if value is None:
        raise UserError(f"{key}: has an empty value")
    return RUN_OPTIONS[option].check(key, value)


def _rules(key: str, value: Any) -> list[dict[str, list[Any]]]:
    rules = [] if value is None else value
    if not isinstance(rules, list) or not all(isinstance(rule, dict) and rule for rule in rules):
        raise UserError(f"{key}: must be a list of mappings, such as [{{method: magnitude, sparsity: [0.1, 0.2]}}]")
    return [{name: _as_list(one) for name, one in _flat(rule).items()} for rule in rules]


def _names(key: str, value: Any) -> list[str]:
    names = [] if value is None else _as_list(value)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{key}={value}: must be a list of names")
    return names


def axis(key: str, value: Any) -> list[Any]:
    """The values of an axis: a list, a range ``{from, to, step}`` (its end included), or one value."""
    if isinstance(value, dict):
        bounds = list(value.values())
        if set(value) != _RANGE or not all(type(one) in (int, float) and isfinite(one) for one in bounds):
            raise UserError(f"{key}: a range is written {{from: 0.1, to: 0.9, step: 0.1}}")
        start, end, step = value["from"], value["to"], value["step"]
        steps = (end - start) / step if step else -1.0
        if not -1e-9 <= steps < _MOST_STEPS:
            raise UserError(f"{key}: the range {value} has no values, or more than {_MOST_STEPS}")
        return [round(start + i * step, 12) for i in range(int(steps + 1e-9) + 1)]
    values = _as_list(value)
    if not values:
        raise UserError(f"{key}: the axis is empty")
    return values


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{key}={value}: must be a mapping")
    return {str(name): one for name, one in (value or {}).items()}


def _flat(value: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested option groups with dots: {model: {outliers: [..]}} and {model.outliers: [..]} are one."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict) and not set(inner) & _RANGE:
            found |= _flat(inner, f"{name}.")
        else:
            found[name] = inner
    return found


def _overridden(sweep: Sweep, overrides: Sequence[str]) -> Sweep:
    """The sweep with axes replaced (and added) by the words of the command line."""
    grid, seeds, levels = dict(sweep.grid), sweep.seeds, dict(sweep.levels)
    given = parse_values(overrides)
    for key, values in given.items():
        if key == "seed":
            seeds = [_checked("seed", key, value) for value in values]
        else:
            check_axis(key)
            grid[key] = values
        if key == "sparsity":
            levels = {}
    return replace(sweep, grid=grid, seeds=seeds, levels=levels, given=frozenset(given))
