"""From the words of the command line to validated runs.

Hydra composes the groups (``method=[wanda,dsnot] model=tiny_1m task=perplexity``) and its grammar
parses the values; names resolve through the catalogue only, and every value is checked against its
declaration before it is used, so unknown keys (``_target_`` too) never get further than here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsebench import catalogue
from sparsebench.catalogue import Catalogue, Declaration
from sparsebench.declare import INSTEAD, Option, options_of
from sparsebench.errors import UserError, closest
from sparsebench.paths import data_folder
from sparsebench.rules import check_pattern, check_stack, check_task, file_content, holding, level_of, unmet
from sparsebench.run import Part, Run, RunOptions

GROUPS = ("method", "model", "calibration", "task")
_KIND_OF_GROUP = {"method": "method", "model": "model", "calibration": "corpus", "task": "task"}
RUN_OPTIONS = options_of(RunOptions)

Word = tuple[str, Any]  # key, value


@dataclass(frozen=True)
class Words:
    """Parsed overrides: the chosen names per group, and the other key = value pairs in order."""

    choices: dict[str, list[str]]
    values: tuple[Word, ...]


@dataclass
class Workspace:
    """Where names are looked up: the package, its plug-ins, and a user's ``--config-dir``."""

    config_dir: Path | None = None
    composed: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)  # by what was chosen

    def __post_init__(self) -> None:
        if self.config_dir is not None:
            self.config_dir = self.config_dir.resolve()
            if not self.config_dir.is_dir():
                raise UserError(f"--config-dir {self.config_dir}: no such folder")

    @cached_property
    def catalogue(self) -> Catalogue:
        return catalogue.build(self._plugins())

    def _plugins(self) -> list[Path]:
        file = self.config_dir / "sparsebench.yaml" if self.config_dir else None
        if file is None or not file.exists():
            return []
        import yaml

        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
        names = (content.get("plugins") or []) if isinstance(content, dict) and not set(content) - {"plugins"} else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: holds only a `plugins:` list of Python files")
        return [file.parent / name for name in names]

    def choices(self, group: str) -> dict[str, Path | None]:
        """Every name a group can take -> its YAML (None for a declaration without one)."""
        found: dict[str, Path | None] = dict.fromkeys(self.catalogue.found[_KIND_OF_GROUP[group]])
        folders = [data_folder("conf"), *([self.config_dir] if self.config_dir else [])]
        for folder in folders:
            found |= {file.stem: file for file in sorted((folder / group).glob("*.yaml"))}
        return dict(sorted(found.items()))

    def group(self, group: str, name: str) -> dict[str, Any]:
        """The composed configuration of one choice as a plain dict (the caller's own copy). A grid has
        many points and few choices: each is composed once."""
        key = f"{group}={name}"
        if key not in self.composed:
            content = self._compose({group: [name]})[group]
            if group == "method" and name not in content:
                raise UserError(f"method={name}: {name}.yaml must begin with the line '# @package method.{name}'")
            self.composed[key] = content[name] if group == "method" else content
        return deepcopy(self.composed[key] or {})

    @cached_property
    def defaults(self) -> dict[str, str]:
        """The names that are chosen when nothing is said (the defaults list of ``conf/config.yaml``)."""
        import yaml

        listed = yaml.safe_load((data_folder("conf") / "config.yaml").read_text(encoding="utf-8"))["defaults"]
        return {group: str(name) for entry in listed if isinstance(entry, dict) for group, name in entry.items()}

    def _compose(self, choices: dict[str, list[str]]) -> dict[str, Any]:
        from hydra import compose, initialize_config_dir
        from hydra.core.config_store import ConfigStore
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        words = []
        for group, names in choices.items():
            known = self.choices(group)
            for name in names:
                if name not in known:
                    raise UserError(f"{group}={name}: unknown {group}{closest(name, known)}")
                if known[name] is None:
                    package = f"method.{name}" if group == "method" else group
                    ConfigStore.instance().store(group=group, name=name, node={}, package=package)
            prefix = "+" if group == "calibration" else ""
            words.append(f"{prefix}{group}=[{','.join(names)}]" if group == "method" else f"{prefix}{group}={names[0]}")
        if self.config_dir:
            words.append(f"hydra.searchpath=['file://{self.config_dir}']")
        try:
            with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
                plain = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"configuration: {' '.join(str(error).split())}") from None
        return plain  # type: ignore[return-value]


def parse(overrides: Sequence[str], *, sweep: bool = False) -> list[Words]:
    """The overrides as words, one entry per point of an inline grid (``sweep``: commas multiply)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    axes: list[list[Word]] = []
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{text}: cannot be read as key=value ({reason})") from None
        key = parsed.key_or_group
        if parsed.is_add() or parsed.is_force_add() or parsed.is_delete() or parsed.package is not None:
            raise UserError(f"{text}: write {key}=value without +, ~ or @")
        if not parsed.is_sweep_override():
            axes.append([(key, _plain(parsed.value()))])
        elif not sweep:
            raise UserError(f"{text}: several values make a grid: add -m, or write a list as {key}=[...]")
        else:
            axes.append([(key, _plain(value)) for value in parsed.sweep_iterator()])
    return [_words(point) for point in itertools.product(*axes)]


def _plain(value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


def _words(point: Iterable[Word]) -> Words:
    choices: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for key, value in point:
        if key in GROUPS:
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) for name in names):
                raise UserError(f"{key}={value}: must be a name or a list of names")
            if len(names) > 1 and key not in ("method", "task"):
                raise UserError(f"{key}={value}: one {key} at a time (a grid: -m {key}={','.join(names)})")
            if choices.setdefault(key, names) != names:
                raise UserError(f"{key} is given twice: {','.join(choices[key])} and {','.join(names)}")
        elif key in values and values[key] != value:
            raise UserError(f"{key} is given twice: {values[key]} and {value}")
        else:
            values[key] = value
    return Words(choices, tuple(values.items()))


def parse_values(overrides: Sequence[str]) -> dict[str, list[Any]]:
    """The overrides of a sweep: key -> the values of that axis (commas, ranges, or one)."""
    found: dict[str, list[Any]] = {}
    for text in overrides:
        for words in parse([text], sweep=True):
            for key, value in (*words.choices.items(), *words.values):
                one = value[0] if key in words.choices and len(value) == 1 else value
                found.setdefault(key, []).append(one)
    return found


class Unused:
    """Options that some points of a grid have no use for; one that no point uses is a mistake."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.errors: dict[str, UserError] = {}

    def add(self, resolver: _Resolver) -> None:
        self.used |= resolver.used
        self.errors |= resolver.unused

    def mistakes(self) -> list[UserError]:
        return [error for key, error in self.errors.items() if key not in self.used]


def resolve(workspace: Workspace, point: Mapping[str, Any], unused: Unused) -> Run:
    """The validated run of one point {key: value}; ``unused`` collects what does not apply to it."""
    words = _words(point.items())
    resolver = _Resolver(workspace, words.choices, words.values)
    run = resolver.run()
    unused.add(resolver)
    return run


def runs(workspace: Workspace, overrides: Sequence[str], *, sweep: bool = False) -> list[Run]:
    """The validated runs of these overrides; ``task=[a,b]`` makes one run per task.

    An option of a method or task that only part of a grid has applies where it exists; one that
    no run has is an error.
    """
    made: list[Run] = []
    unused = Unused()
    for words in parse(overrides, sweep=sweep):
        for name in words.choices.get("task", [None]):
            choices = words.choices | ({"task": [name]} if name else {})
            resolver = _Resolver(workspace, choices, words.values)
            made.append(resolver.run())
            unused.add(resolver)
    for error in unused.mistakes():
        raise error
    return made


class _Resolver:
    """Turns one set of choices and values into a Run."""

    def __init__(self, workspace: Workspace, choices: dict[str, list[str]], values: Sequence[Word]) -> None:
        self.workspace, self.values = workspace, values
        self.used: set[str] = set()
        self.unused: dict[str, UserError] = {}
        self.instead: dict[str, str] = {}  # why a method does not take the run's level
        self.choices = {group: [name] for group, name in workspace.defaults.items()} | choices
        if "calibration" not in choices:
            name = self.choices["model"][0]
            kind = workspace.group("model", name).get("kind", name)
            self.choices["calibration"] = [workspace.catalogue.get("model", kind).calibration]

    def run(self) -> Run:
        self._check_keys()
        options = self._run_options()
        methods = tuple(self._method(name, options) for name in self.choices["method"])
        declarations = [self.workspace.catalogue.get("method", part.name) for part in methods]
        task_declaration, task = self._part("task", self.choices["task"][0], "task")
        check_stack(declarations)
        check_task(declarations, task_declaration, task.options)
        if not all(declaration.taxonomy.reference for declaration in declarations):
            self._check_shared(methods, options)
        needs_data = any("calibration" in part.uses for part in methods)
        _, calibration = self._part("calibration", self.choices["calibration"][0], "calibration")
        _, model = self._part("model", self.choices["model"][0], "model")
        return Run(methods, model, calibration if needs_data else None, task, self._corpus(task), options)

    def _corpus(self, task: Part) -> Part | None:
        """The corpus a task names in its option ``corpus``: its version is part of the run's identity."""
        name = task.options.get("corpus")
        if name is None:
            return None
        known = self.workspace.catalogue.found["corpus"]
        if name not in known:
            raise UserError(f"task.corpus={name}: unknown corpus{closest(name, known)}")
        return Part("corpus", name, name, known[name].version)

    def _run_options(self) -> RunOptions:
        given = {key: value for key, value in self.values if key in RUN_OPTIONS}
        self.used |= set(given) - {"sparsity", "pattern"}  # used where a method takes them
        return RunOptions(**given)

    def _check_shared(self, methods: Sequence[Part], options: RunOptions) -> None:
        """Notes a level or pattern of the run that no method of it takes. To say what holds anyway is no mistake. Not
        for a reference, which is that of every level."""
        names = "+".join(method.label for method in methods)
        for key, idle in (("sparsity", 0.0), ("pattern", "unstructured")):
            asked = getattr(options, key)
            if asked not in (None, idle) and key not in self.used:
                reason = self.instead.get(key, f"method={names} takes no {key}")
                self.unused[key] = UserError(f"{key}={asked}: has no effect here: {reason}")

    def _method(self, name: str, run: RunOptions) -> Part:
        declaration, part = self._part("method", name, f"method.{name}")
        options, changed = dict(part.options), dict(part.changed)
        where = f"method.{name}"
        if "pattern" in options:
            inherited = options["pattern"] is None
            self.used.add("pattern")
            pattern = run.pattern if inherited else options["pattern"]
            options["pattern"] = pattern = check_pattern("pattern" if inherited else f"{where}.pattern", pattern)
            changed.pop("pattern", None)
            if pattern != "unstructured":
                changed["pattern"] = pattern
        native = [k for k, o in declaration.options.items() if o.unit == INSTEAD and options[k] is not None]
        if native and options["sparsity"] is not None:
            raise UserError(f"{where}.{native[0]}={options[native[0]]}: is given instead of sparsity; give one of them")
        if native:
            self.instead["sparsity"] = f"{where}.{native[0]}={options[native[0]]} is given instead"
        elif "sparsity" in options:
            own = options["sparsity"] is not None
            self.used.add("sparsity")
            asked = options["sparsity"] if own else run.sparsity
            key = f"{where}.sparsity" if own else "sparsity"
            options["sparsity"] = changed["sparsity"] = level_of(key, asked, options.get("pattern", "unstructured"))
        uses = holding(declaration.uses, options) + (["sparsity"] if "sparsity" in options and not native else [])
        return Part("method", name, part.name, part.version, options, changed, tuple(uses), part.files)

    def _part(self, group: str, label: str, prefix: str) -> tuple[Declaration, Part]:
        """Validates what one choice's YAML says and the values given for it."""
        content = self.workspace.group(group, label)
        name = content.pop("kind", label)
        declaration = self.workspace.catalogue.get(_KIND_OF_GROUP[group], name)
        own = {key: spec.default for key, spec in declaration.options.items()}
        for key, value in content.items():
            if key not in own:
                raise _unknown(f"{prefix}.{key}", own, prefix)
            own[key] = declaration.options[key].check(f"{prefix}.{key}", value)
        options = own | self._given(prefix, declaration.options, own)
        changed = {k: v for k, v in options.items() if v != declaration.options[k].default}
        files = {
            key: file_content(f"{prefix}.{key}", value)
            for key, value in changed.items()
            if declaration.options[key].unit == "file"
        }
        kind = _KIND_OF_GROUP[group]
        return declaration, Part(kind, label, name, declaration.version, options, changed, files=files)

    def _given(self, prefix: str, specs: Mapping[str, Option], own: dict[str, Any]) -> dict[str, Any]:
        """The values given for one choice, checked. What has no effect beside ``own`` and them is noted instead: it
        makes no other run."""
        found: dict[str, Any] = {}
        for key, value in ((k, v) for k, v in self.values if k.startswith(f"{prefix}.")):
            name = key.removeprefix(f"{prefix}.")
            if name in specs:
                found[name] = specs[name].check(key, value)
            else:
                self.unused[key] = _unknown(key, specs, prefix)
        for name in list(found):
            missing = unmet(specs[name].only, own | found)
            if missing and found[name] != own[name]:
                self.unused[f"{prefix}.{name}"] = UserError(
                    f"{prefix}.{name}={found.pop(name)}: has no effect here: goes with {prefix}.{missing}"
                )
            else:
                self.used.add(f"{prefix}.{name}")
        return found

    def _check_keys(self) -> None:
        """Every key is a run option, or an option under a chosen group. UserError otherwise."""
        for key, _ in self.values:
            head, _, rest = key.partition(".")
            if key in RUN_OPTIONS:
                continue
            if head not in GROUPS:
                raise _unknown(key, [*RUN_OPTIONS, *GROUPS], "")
            if head == "method":
                name, _, rest = rest.partition(".")
                if name not in self.choices["method"]:
                    known = self.workspace.choices("method")
                    if name not in known:
                        raise UserError(f"{key}: unknown method {name!r}{closest(name, known)}")
                    self.unused[key] = UserError(f"{key}: method {name} is not part of this run")
            if not rest:
                raise UserError(f"{key}: an option is written {head}.{'<method>.' if head == 'method' else ''}<option>")


def _unknown(key: str, valid: Iterable[str], prefix: str) -> UserError:
    last = key.rsplit(".", 1)[-1]
    where = f" of {prefix}" if prefix else ""
    return UserError(f"{key}: unknown option{where}{closest(last, valid)}")
