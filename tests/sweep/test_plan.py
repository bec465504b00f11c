"""From a sweep to its runs: what is planned, how it is checked, kept and cut into chunks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweep_world as world
from commands import Command
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebench.analysis.claim_list import load_claims
from sparsebench.config import RUN_OPTIONS, Unused, Workspace, resolve, runs
from sparsebench.errors import UserError
from sparsebench.paths import data_folder
from sparsebench.rules import unmet
from sparsebench.run import Part, Run
from sparsebench.sweep import plan as plans
from sparsebench.sweep.spec import Sweep, load

WORKSPACE = Workspace()


@pytest.fixture(autouse=True)
def known_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan here needs the weights of a model: their content is a constant."""
    from sparsebench.models.embedded import Ladder

    monkeypatch.setattr(Ladder, "content", lambda self: f"content of {self.rung}")


def content_of(run: Run) -> str:
    return f"content of {run.model.options['rung']}"


def sweep(grid: dict[str, Any], **more: Any) -> Sweep:
    return Sweep(
        "toy", grid={key: value if isinstance(value, list) else [value] for key, value in grid.items()}, **more
    )


def points(made: plans.Plan, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(run.point[key] for key in keys) for run in made.runs]


def mistakes(one: Sweep) -> list[str]:
    with pytest.raises(UserError) as caught:
        plans.make(WORKSPACE, one)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# -- what is planned ---------------------------------------------------------------------------------------------


def test_levels_and_seeds_multiply_only_methods_that_use_them() -> None:
    one = sweep({"method": ["dense", "magnitude", "random"], "sparsity": [0.3, 0.5]}, seeds=[0, 1, 2])
    assert points(plans.make(WORKSPACE, one), "method", "sparsity", "seed") == [
        ("dense", None, None),
        ("magnitude", 0.3, None), ("magnitude", 0.5, None),
        *[("random", level, seed) for level in (0.3, 0.5) for seed in (0, 1, 2)],
    ]  # fmt: skip


def test_baselines_levels_and_exclusions() -> None:
    one = sweep(
        {"method": ["magnitude", "wanda", "dense"], "sparsity": [0.3, 0.5]},
        baselines=["dense", "random"], levels={"wanda": [0.7]}, exclude=[{"method": ["random"], "sparsity": [0.3]}],
    )  # fmt: skip
    assert points(plans.make(WORKSPACE, one), "method", "sparsity") == [
        ("magnitude", 0.3), ("magnitude", 0.5), ("wanda", 0.7), ("dense", None), ("random", 0.5),
    ]  # fmt: skip


def test_a_combination_that_cannot_run_may_be_left_out() -> None:
    grid = {"method": ["quest"], "task": ["sf_niah"], "task.protocol": ["windows", "continuation"], "sparsity": [0.5]}
    assert any("quest acts in phase decode" in one for one in mistakes(sweep(grid)))
    made = plans.make(WORKSPACE, sweep(grid, exclude=[{"task.protocol": ["windows"], "method": ["quest"]}]))
    assert points(made, "method", "task.protocol") == [("quest", "continuation")]


def test_stacks_tasks_and_options_of_one_method() -> None:
    one = sweep({
        "method": [["wanda", "dsnot"], "wanda+dsnot", "magnitude"], "method.wanda.norm": ["l1", "l2"],
        "task": ["perplexity", ["tinyworld", "perplexity"]], "task.samples": [4, 8],
    })  # fmt: skip
    made = plans.make(WORKSPACE, one)
    assert sorted(points(made, "method", "task")) == sorted(
        [("wanda+dsnot", "perplexity")] * 2 + [("wanda+dsnot", "tinyworld")] * 4
        + [("magnitude", "perplexity")] + [("magnitude", "tinyworld")] * 2
    )  # fmt: skip
    assert len({run.sparse_model_id for run in made.runs}) == 3


def test_a_list_of_tasks_on_the_command_line_is_one_run_per_task() -> None:
    one = load(WORKSPACE, "wanda", ["task=[perplexity,tinyworld]", "method=magnitude", "sparsity=0.5"])
    assert {task for (task,) in points(plans.make(WORKSPACE, one), "task")} == {"perplexity", "tinyworld"}


# -- what is refused ---------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once() -> None:
    one = sweep({
        "method": ["wanda", "wnda"], "sparsity": [0.5, 1.5, "high"], "task.nonsense": 1, "method.magnitud.x": 1,
        "method.random.sparsity": 0.5, "task.context": [64, -1], "threads": [1], "colour": "red",
    }, levels={"magnitude": [0.5]})  # fmt: skip
    text = "\n".join(mistakes(one))
    assert "colour: unknown option" in text
    one = replace(one, grid={key: value for key, value in one.grid.items() if key != "colour"})
    text = "\n".join(mistakes(one))
    for part in ("method=wnda", "sparsity=1.5", "sparsity=high", "task.nonsense", "method.magnitud.x",
                 "method.random.sparsity: method random is not in the grid", "task.context=-1",
                 "levels.magnitude: no such method"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (sweep({"method": ["dense"]}, baselines=["densee"]), "method=densee"),
        (sweep({"method": ["magnitude"]}, exclude=[{"method": ["magnitude"]}]), "no run is left"),
        (sweep({"method": ["magnitude"]}, exclude=[{"method": ["magnitud"]}]), "no run of the grid fits it"),
        (sweep({"method": [["magnitude", "wanda"]]}), "magnitude"),
        (sweep({"method": [7]}), "7"),
        (sweep({"method": ["dense"], "hydra.run.dir": ["x"]}), "hydra"),
        (sweep({"method": ["dense"], "method.dense._target_": ["os.system"]}), "_target_"),
    ],
)
def test_what_cannot_be_planned_is_refused(one: Sweep, said: str) -> None:
    assert any(said in line for line in mistakes(one))


def test_a_model_that_cannot_be_had_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebench.models.embedded import Ladder

    asked = []

    def refuse(model: Ladder) -> str:
        asked.append(model.rung)
        raise UserError(f"no {model.rung}")

    monkeypatch.setattr(Ladder, "content", refuse)
    grid = {"model": ["tiny_100k", "tiny_1m"], "method": ["wanda"], "sparsity": [0.25, 0.5, 0.75]}
    with pytest.raises(UserError) as raised:
        plans.make(WORKSPACE, sweep(grid))
    assert asked == ["tiny_100k", "tiny_1m"] and "no tiny_100k" in str(raised.value)


def test_what_the_file_says_of_a_method_taken_out_is_no_mistake() -> None:
    one = sweep(
        {"method": ["dense"], "method.wanda.norm": ["l1"]}, levels={"wanda": [0.5]}, given=frozenset({"method"})
    )
    assert points(plans.make(WORKSPACE, one), "method") == [("dense",)]
    assert mistakes(replace(one, given=frozenset({"method", "method.wanda.norm"})))


def test_bad_input_leaves_no_store(command: Command, tmp_path: Path) -> None:
    for words in (["wanda", "sparsity=0.5,1.5,2", "task.nonsense=1"], ["wnda"], ["wanda", "cluster=moon"], []):
        answer = command("sweep", *words, "--plan") if words[:1] != ["wnda"] else command("sweep", *words)
        assert answer.code == 2, answer.out
        assert answer.err.startswith("sparsebench: ")
    answer = command("sweep", "wanda", "sparsity=0.5,1.5,2", "task.nonsense=1")
    assert answer.code == 2
    assert [word for word in ("sparsity=1.5", "sparsity=2", "task.nonsense") if word not in answer.err] == []
    assert not (tmp_path / "store").exists()


# -- claims ------------------------------------------------------------------------------------------------------


def claim(left: str, **more: Any) -> Any:
    (one,) = load_claims([{
        "id": "toy.one", "paper": "toy", "place": "Table 1", "sentence": "A sentence.", "left": left, "relation": ">",
        "right": "nll(method=wanda)", "tags": {"tiny_scale": "yes"}, **more,
    }], "claims")  # fmt: skip
    return one


GRID = {"method": ["magnitude", "wanda"], "sparsity": [0.3, 0.5], "task": ["perplexity"]}


def test_a_claim_selects_exactly_one_run_per_call_or_is_a_mistake() -> None:
    fine = claim("nll(method=magnitude)", for_each=["sparsity"])
    assert plans.make(WORKSPACE, sweep(GRID, claims=[fine])).untested == ()
    for broken in (claim("nll(method=magnitude)"), claim("nll(method=sparsegpt)", for_each=["sparsity"])):
        assert any(line.startswith("toy.one: ") for line in mistakes(sweep(GRID, claims=[fine, broken])))


def test_claims_of_an_overridden_grid_are_left_untested() -> None:
    fine = claim("nll(method=magnitude)", for_each=["sparsity"])
    other = sweep({**GRID, "method": ["wanda"]}, claims=[fine], given=frozenset({"method"}))
    untested = plans.make(WORKSPACE, other).untested
    assert untested and all(problem.startswith("toy.one: ") for problem in untested)


def test_a_broken_claim_in_a_file_is_bad_input(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    text = (data_folder("sweeps") / "wanda.yaml").read_text(encoding="utf-8")
    (tmp_path / "sweeps" / "wanda.yaml").write_text(text.replace("nll(method=wanda)", "nll(method=sparsegpt)"))
    answer = command("sweep", "wanda", "--config-dir", str(tmp_path))
    assert answer.code == 2
    assert "wanda.beats_magnitude" in answer.err
    assert not (tmp_path / "store").exists()


# -- words and ids -----------------------------------------------------------------------------------------------

AXES: dict[str, list[list[Any]]] = {
    "method": [["wanda"], ["magnitude"], ["dense"], ["random"], ["wanda", "dsnot"], ["magnitude", "dsnot", "perp"]],
    "model": [["tiny_1m"], ["tiny_100k"]],
    "model.outliers": [[True], [False]],
    "model.outliers_sigma": [[0.5], [1e-05], [2]],
    "task": [["perplexity"], ["tinyworld"]],
    "task.context": [[64], [128]],
    "sparsity": [[0.1], [0.30000000000000004], [0], [None]],
    "calibration": [["kjv"], ["tinyworld"]],
    "calibration.nsamples": [[3], [16]],
    "method.wanda.norm": [["l1"], ["l2"]],
    "seed": [[0], [7]],
}
grids = st.fixed_dictionaries(
    {}, optional={key: st.lists(st.sampled_from(values), min_size=1, max_size=2) for key, values in AXES.items()}
).map(lambda found: {key: [one if key == "method" else one[0] for one in values] for key, values in found.items()})


@settings(max_examples=40, deadline=None)
@given(grids)
def test_the_words_of_a_planned_run_make_the_same_run(grid: dict[str, Any]) -> None:
    seeds = grid.pop("seed", [0])
    one = sweep(grid, seeds=seeds, given=frozenset({"method"}))
    try:
        made = plans.make(WORKSPACE, one)
    except UserError:  # an option that nothing in this grid has
        return
    for planned in made.runs:
        (run,) = runs(WORKSPACE, planned.words)
        assert run.run_id(content_of(run)) == planned.run_id
        assert run.sparse_model_id(content_of(run)) == planned.sparse_model_id


values = (
    st.text(max_size=12) | st.text(st.sampled_from("ab'\"\\,=[]{}$: \n#()0.*é"), max_size=8) | st.booleans() | st.none()
    | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["null", "True", "1", "1e5", "inf", "nan", "0x1", "${a}", "a b", "2:4", "'", "\\'", "\\"])
)  # fmt: skip


@given(values | st.lists(values, max_size=4))
def test_every_value_is_written_so_that_it_is_read_back(value: Any) -> None:
    from sparsebench.config import parse

    if isinstance(value, str) and "\0" in value:  # no command line can hold it
        return
    (words,) = parse([plans._word("task.file", value)])
    assert words.values == (("task.file", value),)


# -- composed once, and composed whole ---------------------------------------------------------------------------


def whole(point: dict[str, Any]) -> dict[str, Any]:
    """The groups as Hydra composes them from the choices and values of one point, in one go."""
    from hydra import compose
    from omegaconf import OmegaConf

    words = [f"method=[{','.join(point['method'])}]", *(f"{group}={point[group]}" for group in ("model", "task"))]
    words.append(f"+calibration={point['calibration']}")
    words += [f"++{plans._word(key, value)}" for key, value in point.items() if "." in key]
    plain = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
    assert isinstance(plain, dict)
    return plain


def random_value(dice: random.Random, option: Any) -> Any:
    base = option.type.removesuffix(" | None")
    if option.choices is not None:
        return dice.choice(option.choices)
    if base == "bool":
        return dice.random() < 0.5
    low, high = option.low if option.low is not None else (option.above or 0), option.high or option.below or 1000
    if base == "int":
        return dice.randint(int(low), int(min(high, low + 1000)))
    return round(dice.uniform(low + 1e-3, min(high, low + 10) - 1e-3), 6) if base == "float" else option.default


def random_point(dice: random.Random) -> dict[str, Any]:
    """Choices of every group and values for a few of their options."""
    point: dict[str, Any] = {
        "method": dice.choice([["dense"], ["magnitude"], ["wanda"], ["random"], ["sparsegpt"], ["wanda", "dsnot"]]),
        "model": dice.choice([name for name in WORKSPACE.choices("model") if name not in ("hf", "ladder")]),
        "task": dice.choice(["perplexity", "tinyworld", "wikitext2", "zero_shot"]),
        "calibration": dice.choice(["kjv", "tinyworld", "c4", "wikitext2"]),
    }
    places = [("model", "model", point["model"]), ("task", "task", point["task"])]
    places += [("corpus", "calibration", point["calibration"])]
    places += [("method", f"method.{name}", name) for name in point["method"]]
    for kind, prefix, label in places:
        group = "calibration" if kind == "corpus" else kind
        name = WORKSPACE.group(group, label).get("kind", label)
        options = WORKSPACE.catalogue.get(kind, name).options
        usable = [key for key in options if key not in ("sparsity", "pattern", "protocol", "corpus", "file")]
        for key in dice.sample(usable, min(len(usable), dice.randint(0, 2))):
            value = random_value(dice, options[key])
            if not isinstance(value, tuple):
                point[f"{prefix}.{key}"] = value
    return point


def test_composed_once_equals_composed_whole_on_200_random_runs() -> None:
    from hydra import initialize_config_dir

    dice = random.Random(0)
    found = [random_point(dice) for _ in range(200)]
    resolved = [resolve(WORKSPACE, point, Unused()) for point in found]
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        wholes = [whole(point) for point in found]
    for run, composed in zip(resolved, wholes, strict=True):
        parts: list[tuple[Part | None, Any]] = [(run.model, composed["model"]), (run.task, composed["task"])]
        parts += [(run.calibration, composed["calibration"])]
        parts += [(part, composed["method"][part.label]) for part in run.methods]
        for part, content in parts:
            if part is None:
                continue
            said = dict(content or {})
            assert said.pop("kind", part.label) == part.name
            declared = WORKSPACE.catalogue.get(part.kind, part.name).options
            expected = {key: said.pop(key, option.default) for key, option in declared.items()}
            assert said == {}
            for key, value in expected.items():
                if key in ("sparsity", "pattern"):  # these follow the run's where they are not set
                    continue
                if not unmet(declared[key].only, part.options):  # what has no effect stays as it is
                    assert part.options[key] == declared[key].check(key, value), (part.label, key)
    assert sum("." in key for point in found for key in point) > 200
    assert set(RUN_OPTIONS) >= {"sparsity", "pattern", "seed"}


# -- kept plans --------------------------------------------------------------------------------------------------


def test_the_same_grid_keeps_its_plan_and_another_tells_what_changed(tmp_path: Path) -> None:
    small = plans.make(WORKSPACE, sweep({"method": ["magnitude"], "sparsity": [0.3, 0.5]}))
    other = plans.make(WORKSPACE, sweep({"method": ["magnitude"], "sparsity": [0.5, 0.7]}))
    assert plans.newest(tmp_path, "toy") is None
    first, new, gone = plans.keep(small, tmp_path)
    assert (first.number, new, gone) == (1, small.ids(), [])
    again, new, gone = plans.keep(small, tmp_path)
    assert (again, new, gone) == (first, [], [])
    second, new, gone = plans.keep(other, tmp_path)
    assert (second.number, new, gone) == (2, other.ids()[1:], small.ids()[:1])
    assert plans.newest(tmp_path, "toy") == second
    assert sorted(file.name for file in (tmp_path / "plans" / "toy").iterdir()) == ["0001.jsonl", "0002.jsonl"]


def test_the_same_runs_in_other_words_are_kept_with_todays_words(tmp_path: Path) -> None:
    grid = {"method": ["magnitude"], "sparsity": [0.3]}
    plans.keep(plans.make(WORKSPACE, sweep(grid)), tmp_path)
    kept, new, gone = plans.keep(plans.make(WORKSPACE, sweep({**grid, "batch_size": [2]})), tmp_path)
    assert (kept.number, new, gone) == (2, [], [])
    assert "batch_size=2" in kept.runs[0].words


def test_two_who_keep_a_plan_at_once_both_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = world.plan_of([world.planned(1)])
    other = world.plan_of([world.planned(2)])
    plans.keep(one, tmp_path)
    monkeypatch.setattr(plans, "newest", lambda store, name: None)  # it looked before the first was written
    kept, _, _ = plans.keep(other, tmp_path)
    monkeypatch.undo()
    assert kept.number == 2
    newest = plans.newest(tmp_path, "toy")
    assert newest is not None and newest.ids() == other.ids()


def test_a_store_that_cannot_hold_a_plan_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("a file")
    with pytest.raises(UserError, match=r"store=.*cannot be written"):
        plans.keep(world.plan_of([world.planned(1)]), tmp_path)


# -- chunks ------------------------------------------------------------------------------------------------------

many = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=40).map(
    lambda pairs: [
        world.planned(number, model=f"m{model}", sparse_model=10 * model + sparse)
        for number, (model, sparse) in enumerate(pairs)
    ]
)


@given(many, st.integers(1, 12))
def test_chunks_hold_every_run_once_and_split_no_sparse_model(made: list[plans.Planned], size: int) -> None:
    found = plans.chunks(made, size)
    assert sorted(run.run_id for chunk in found for run in chunk) == sorted(run.run_id for run in made)
    sizes = {run.sparse_model_id: 0 for run in made}
    for run in made:
        sizes[run.sparse_model_id] += 1
    for chunk in found:
        assert 1 <= len(chunk) <= size
        assert len({run.group for run in chunk}) == 1
        order = [run.sparse_model_id for run in chunk]
        assert order == sorted(order, key=order.index), "runs of one sparse model are neighbours"
    for model, count in sizes.items():
        holders = sum(any(run.sparse_model_id == model for run in chunk) for chunk in found)
        assert holders == (1 if count <= size else -(-count // size)) or (count > size and holders >= count // size)
