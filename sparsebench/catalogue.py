"""Reads declarations from source files without importing them, so that listing needs no torch.

The built-in folders are searched, then plug-ins: modules named by entry points of the group
``sparsebench.plugins`` and the Python files in a user's ``plugins:`` list. ``load`` imports the one
file that is needed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sparsebench.declare import KINDS, PHASES, STAGES, TARGETS, Option, Taxonomy, option
from sparsebench.errors import UserError, closest

_PACKAGE = Path(__file__).parent
_FOLDERS = ("methods", "tasks", "models", "corpora")
# What the decorators of `declare` require beside name and version, and their defaults, known without a call.
_NEEDED: dict[str, tuple[str, ...]] = {
    "method": ("paper", "target", "phase", "taxonomy"),
    "task": ("metric", "better"),
    "model": ("calibration",),
    "corpus": (),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "method": {"stage": None, "uses": (), "baseline": None},
    "task": {"gives": ("prefill",)},
}


@dataclass(frozen=True)
class Declaration:
    """What is known of a method, task, model or corpus without importing it."""

    kind: str
    name: str
    version: int
    summary: str
    options: dict[str, Option]
    facts: dict[str, Any]
    file: Path
    class_name: str

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)


@dataclass
class Catalogue:
    """Every declaration, by kind and name."""

    found: dict[str, dict[str, Declaration]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    def add_files(self, files: Iterable[Path]) -> None:
        for file in files:
            for declaration in read(file):
                known = self.found[declaration.kind].setdefault(declaration.name, declaration)
                if known.file.resolve() != declaration.file.resolve():
                    what = f"{declaration.kind} {declaration.name!r}"
                    raise UserError(f"{what} is declared twice: {known.file} and {declaration.file}")

    def get(self, kind: str, name: str) -> Declaration:
        known = self.found[kind]
        if name not in known:
            raise UserError(f"{kind}={name}: unknown {kind}{closest(name, known)}")
        return known[name]

    def load(self, kind: str, name: str) -> Any:
        """The declared class, imported now."""
        declaration = self.get(kind, name)
        return getattr(_import(declaration.file), declaration.class_name)


def build(plugins: Iterable[Path] = ()) -> Catalogue:
    """The catalogue of the package, its entry points and the given plug-in files."""
    catalogue = Catalogue()
    for folder in _FOLDERS:
        catalogue.add_files(sorted((_PACKAGE / folder).rglob("*.py")))
    for point in entry_points(group="sparsebench.plugins"):
        catalogue.add_files([_module_file(point.value)])
    catalogue.add_files(plugins)
    return catalogue


@cache
def read(file: Path) -> tuple[Declaration, ...]:
    """The declarations in one source file. UserError when it cannot be read or declares nonsense."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plugins: cannot read {file}: {error}") from None
    if not any(f"@{kind}(" in source for kind in KINDS):
        return ()
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"plugins: {file} is not valid Python: {error}") from None
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and _called(decorator) in KINDS:
                    found.append(_declaration(file, tree, node, decorator))
    return tuple(found)


def _declaration(file: Path, tree: ast.Module, node: ast.ClassDef, decorator: ast.Call) -> Declaration:
    where = f"{file.name}:{node.lineno} class {node.name}"
    try:
        facts = {item.arg or "": _literal(item.value) for item in decorator.keywords}
        options = _options(file, tree, node)
    except ValueError as error:
        raise UserError(f"{where}: a declaration must be made of literals: {error}") from None
    kind = _called(decorator)
    for name in ("name", "version", *_NEEDED[kind]):
        if name not in facts:
            raise UserError(f"{where}: @{kind} needs {name}=")
    facts = {**_DEFAULTS.get(kind, {}), **facts}
    if kind == "method":
        _check_method(where, facts)
    lines = (ast.get_docstring(node) or "").splitlines()
    name, version = facts.pop("name"), facts.pop("version")
    return Declaration(kind, name, version, lines[0] if lines else "", options, facts, file, node.name)


def _check_method(where: str, facts: dict[str, Any]) -> None:
    for name, valid in (("target", TARGETS), ("phase", PHASES), ("stage", [*STAGES, None])):
        if facts[name] not in valid:
            raise UserError(f"{where}: {name}={facts[name]!r}{closest(str(facts[name]), map(str, valid))}")


def _options(file: Path, tree: ast.Module, node: ast.ClassDef) -> dict[str, Option]:
    """The class's options behind those of its bases (read from their own files)."""
    options: dict[str, Option] = {}
    for base in node.bases:
        found = _find_class(file, tree, base.id) if isinstance(base, ast.Name) else None
        if found:
            options |= _options(*found)
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if isinstance(item.value, ast.Call) and _called(item.value) == "option":
            arguments = [_literal(one) for one in item.value.args]
            keywords = {one.arg or "": _literal(one.value) for one in item.value.keywords}
            spec: Option = option(*arguments, **keywords).metadata["option"]
            options[item.target.id] = replace(spec, type=ast.unparse(item.annotation))
    return options


def _find_class(file: Path, tree: ast.Module, name: str) -> tuple[Path, ast.Module, ast.ClassDef] | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file, tree, node
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            if node.module == "sparsebench.declare" or node.module.partition(".")[0] in sys.stdlib_module_names:
                return None  # no options there, as in ABC
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            other = _module_file(node.module)
            return _find_class(other, _parsed(other), original)
    return None


@cache
def _parsed(file: Path) -> ast.Module:
    """A file that holds bases: many methods share one."""
    return ast.parse(file.read_text(encoding="utf-8"))


def _module_file(module: str) -> Path:
    if module.startswith("sparsebench."):
        path = _PACKAGE.joinpath(*module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"plugins: module {module!r} was not found")
    return Path(spec.origin)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and _called(node) == "Taxonomy":
        return Taxonomy(**{item.arg or "": _literal(item.value) for item in node.keywords})
    return ast.literal_eval(node)


def _import(file: Path) -> Any:
    if _PACKAGE in file.parents:
        parts = file.relative_to(_PACKAGE.parent).with_suffix("").parts
        return importlib.import_module(".".join(parts))
    name = f"sparsebench_plugin_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"plugins: cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
