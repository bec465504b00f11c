"""What is read from the source without importing it is what the imported classes declare."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from sparsebench import catalogue
from sparsebench.catalogue import Catalogue
from sparsebench.config import GROUPS, Workspace, runs
from sparsebench.declare import KINDS, PHASES, TARGETS, Taxonomy, options_of
from sparsebench.errors import UserError
from sparsebench.paths import data_folder

WORKSPACE = Workspace()
BUILT_IN = WORKSPACE.catalogue
DECLARED = [(kind, name) for kind in KINDS for name in BUILT_IN.found[kind]]
YAMLS = [(group, file) for group in GROUPS for file in sorted((data_folder("conf") / group).glob("*.yaml"))]


@pytest.fixture(scope="module")
def built_in() -> Catalogue:
    return BUILT_IN


def test_the_first_methods_tasks_models_and_corpora_are_there(built_in: Catalogue) -> None:
    expected = {
        "method": {"dense", "given", "random", "magnitude", "wanda"},
        "task": {"perplexity", "tinyworld", "lm_eval"},
        "model": {"ladder", "hf"},
        "corpus": {"kjv", "tinyworld", "file", "hub", "c4", "wikitext2"},
    }
    for kind, names in expected.items():
        assert names <= set(built_in.found[kind]), kind


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_static_declarations_equal_the_imported_ones(kind: str, name: str, built_in: Catalogue) -> None:
    static = built_in.get(kind, name)
    cls = built_in.load(kind, name)
    declared = dict(cls.declared)
    assert (static.kind, static.name, static.version) == (
        declared.pop("kind"),
        declared.pop("name"),
        declared.pop("version"),
    )
    assert static.facts == declared
    imported = options_of(cls)
    assert list(static.options) == list(imported)
    assert {key: vars(spec) for key, spec in static.options.items()} == {
        key: vars(spec) for key, spec in imported.items()
    }
    assert static.summary
    assert static.summary == str(cls.__doc__).splitlines()[0]


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_every_option_explains_itself_and_its_default_is_valid(kind: str, name: str, built_in: Catalogue) -> None:
    cls = built_in.load(kind, name)
    for key, spec in built_in.get(kind, name).options.items():
        assert spec.help, key
        if spec.default is None:
            assert spec.type.endswith("| None"), (
                f"{key}: a default of None needs a type that allows it, not {spec.type}"
            )
        assert spec.check(key, spec.default) == spec.default, key
    undeclared = [item.name for item in fields(cls) if "option" not in item.metadata and item.default is not MISSING]
    assert not undeclared, "every field with a default is an option"


@pytest.mark.parametrize("name", BUILT_IN.found["method"])
def test_methods_have_a_paper_a_taxonomy_and_a_known_baseline(name: str, built_in: Catalogue) -> None:
    method = built_in.get("method", name)
    assert method.paper
    assert method.target in TARGETS
    assert method.phase in PHASES
    assert isinstance(method.taxonomy, Taxonomy)
    assert {entry.split(" if ")[0] for entry in method.uses} <= {"calibration", "seed"}
    assert method.baseline is None or method.baseline in built_in.found["method"]
    assert method.target in method.file.parts, "a method lives in the folder of its target"
    assert (data_folder("conf") / "method" / f"{name}.yaml").exists()


@pytest.mark.parametrize(("group", "file"), YAMLS, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_every_yaml_validates_against_its_declaration(group: str, file: Path) -> None:
    """It composes, names a declaration, and sets declared options to valid values."""
    package = f"method.{file.stem}" if group == "method" else group
    assert file.read_text(encoding="utf-8").startswith(f"# @package {package}\n")
    content = dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    kind = {"calibration": "corpus"}.get(group, group)
    declaration = BUILT_IN.get(kind, content.pop("kind", file.stem))
    chosen = file.stem
    if group == "method" and declaration.stage in ("refine", "recover"):  # these need a mask to work on
        chosen = f"[magnitude,{file.stem}]"
    words = [f"{group}={chosen}"]
    if group == "method" and "decode" in declaration.phase:  # these act on a task that decodes
        words.append("task.protocol=continuation")
    (run,) = runs(WORKSPACE, words)
    part = {"method": run.methods[-1], "model": run.model, "task": run.task, "calibration": run.calibration}[group]
    assert part is not None
    assert part.label == file.stem
    for key, value in content.items():
        assert key in declaration.options
        assert part.options[key] == declaration.options[key].check(key, value)


SOURCE = '''
from dataclasses import dataclass
from sparsebench.declare import Declared, Taxonomy, corpus, method, option

@dataclass(frozen=True)
class Base(Declared):
    first: int = option(1, "one")

@corpus(name="mine", version=3)
@dataclass(frozen=True)
class Mine(Base):
    """Mine."""
    second: float | None = option(None, "two", low=0.0)
'''


def test_what_a_declaration_leaves_out_has_the_decorators_defaults(toys: Path) -> None:
    """A task without ``gives``, a method without ``stage``, ``uses`` and ``baseline``."""
    mine = Workspace(toys).catalogue
    for kind, name in (("task", "constant"), ("method", "evicts"), ("model", "smallest"), ("corpus", "alphabet")):
        declared = dict(mine.load(kind, name).declared)
        assert mine.get(kind, name).facts == {k: v for k, v in declared.items() if k not in ("kind", "name", "version")}


def test_options_of_a_base_come_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    (mine,) = catalogue.read(tmp_path / "mine.py")
    assert (mine.kind, mine.name, mine.version, mine.summary) == ("corpus", "mine", 3, "Mine.")
    assert list(mine.options) == ["first", "second"]
    assert mine.options["second"].type == "float | None"


@pytest.mark.parametrize(
    ("source", "say"),
    [
        ("@corpus(name='a')\nclass A: pass", "version"),
        ("@corpus(version=1)\nclass A: pass", "name"),
        ("@corpus(name='a', version=len('a'))\nclass A: pass", "literals"),
        ("@method(name='a', version=1)\nclass A: pass", "paper"),
        ("@task(name='a', version=1)\nclass A: pass", "metric"),
        ("@model(name='a', version=1)\nclass A: pass", "calibration"),
        (
            "@method(name='a', version=1, paper='', target='weight', phase='once', taxonomy=1)\nclass A: pass",
            "'weights'",
        ),
        ("@method(name='a', version=1, paper='', target='weights', phase='now', taxonomy=1)\nclass A: pass", "now"),
        ("@corpus(name='a', version=1)\nclass A:\n    x: int = option(compute(), 'x')", "literals"),
        ("@corpus(\nclass A: pass", "not valid Python"),
    ],
)
def test_a_declaration_that_is_wrong_is_one_line(source: str, say: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=say) as error:
        catalogue.read(tmp_path / "wrong.py")
    assert "\n" not in str(error.value)
    assert "wrong.py" in str(error.value)


def test_reading_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("import no_such_module_anywhere\n" + SOURCE, encoding="utf-8")
    assert [one.name for one in catalogue.read(tmp_path / "loud.py")] == ["mine"]
    assert "sparsebench_plugin_loud" not in sys.modules


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_conditions_name_options_and_their_values(kind: str, name: str, built_in: Catalogue) -> None:
    options = built_in.get(kind, name).options
    for option in options.values():
        for part in option.only.split(" and ") if option.only else ():
            keys, _, values = part.partition("=")
            for key in keys.split("|"):
                choices = {"bool": ("true", "false")}.get(options[key].type, options[key].choices)
                assert not values or choices is None or set(values.split("|")) <= set(choices), (key, values)
