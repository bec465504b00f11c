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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsebench.analysis.claims import Claim, load_claims
from sparsebench.config import Workspace, parse_values
from sparsebench.errors import UserError, closest
from sparsebench.paths import data_folder

_KEYS = "summary paper grid levels exclude baselines seeds claims".split()
_MOST_STEPS = 10_000


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
    overridden: bool = False


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
    """The sweep of that name. UserError that lists everything wrong with its file."""
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

    try:
        with initialize_config_dir(str(file.parent.resolve()), version_base="1.3"):
            plain = OmegaConf.to_container(compose(file.stem), resolve=True)
    except (HydraException, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"sweep {file.stem}: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UserError(f"sweep {file.stem}: must be a mapping of {', '.join(_KEYS)}")
    return {str(key): value for key, value in plain.items()}


def _typed(name: str, content: dict[str, Any]) -> Sweep:
    where = f"sweep {name}"
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key}{closest(key, _KEYS)}")
    grid = _mapping(where, "grid", content.get("grid"))
    if not grid:
        raise UserError(f"{where}: grid is empty")
    exclude = content.get("exclude") or []
    if not isinstance(exclude, list):
        raise UserError(f"{where}: exclude must be a list of mappings")
    levels = _mapping(where, "levels", content.get("levels"))
    return Sweep(
        name,
        str(content.get("summary", "")),
        content.get("paper"),
        {key: axis(where, key, value) for key, value in grid.items()},
        {key: [float(x) for x in axis(where, f"levels.{key}", value)] for key, value in levels.items()},
        [{k: _as_list(v) for k, v in _mapping(where, "exclude", one).items()} for one in exclude],
        [str(one) for one in _as_list(content.get("baselines") or [])],
        [int(one) for one in axis(where, "seeds", content.get("seeds", [0]))],
        load_claims(content.get("claims") or [], where),
    )


def axis(where: str, key: str, value: Any) -> list[Any]:
    """The values of an axis: a list, a range ``{from, to, step}`` (its end included), or one value."""
    if isinstance(value, dict):
        if set(value) != {"from", "to", "step"} or not all(isinstance(x, (int, float)) for x in value.values()):
            raise UserError(f"{where}: {key}: a range is written {{from: 0.1, to: 0.9, step: 0.1}}")
        start, end, step = value["from"], value["to"], value["step"]
        count = round((end - start) / step) + 1 if step else 0
        if not 1 <= count <= _MOST_STEPS:
            raise UserError(f"{where}: {key}: the range {value} has no values, or more than {_MOST_STEPS}")
        return [round(start + i * step, 12) for i in range(count)]
    values = _as_list(value)
    if not values:
        raise UserError(f"{where}: {key}: the axis is empty")
    return values


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _mapping(where: str, key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a mapping")
    return _flat(value) if key == "grid" else {str(k): v for k, v in value.items()}


def _flat(value: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested option groups with dots: {model: {outliers: [..]}} and {model.outliers: [..]} are one."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict) and set(inner) != {"from", "to", "step"}:
            found |= _flat(inner, f"{name}.")
        else:
            found[name] = inner
    return found


def _overridden(sweep: Sweep, overrides: Sequence[str]) -> Sweep:
    """The sweep with axes replaced (and added) by the words of the command line."""
    grid, seeds, levels = dict(sweep.grid), sweep.seeds, dict(sweep.levels)
    for key, values in parse_values(overrides).items():
        if key == "seed":
            seeds = [int(value) for value in values]
        else:
            grid[key] = values
        if key == "sparsity":
            levels = {}
    return replace(sweep, grid=grid, seeds=seeds, levels=levels, overridden=bool(overrides))
