"""Sweep files: what they say, what the command line replaces in them, and every mistake in one answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.sweep import spec

WANDA = spec.load(Workspace(), "wanda")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "sweeps").mkdir()
    return tmp_path


def load(mine: Path, text: str, *overrides: str, name: str = "own") -> spec.Sweep:
    (mine / "sweeps" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return spec.load(Workspace(mine), name, overrides)


def mistakes(mine: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(mine, text, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_a_file_becomes_typed_data(mine: Path) -> None:
    sweep = load(mine, """
summary: one line
paper: wanda
grid:
  model: {outliers: [false, true]}
  model.dtype: float32
  method: [magnitude, wanda, [wanda, dsnot]]
  sparsity: {from: 0.1, to: 0.9, step: 0.4}
levels: {wanda: [0.5], wanda+dsnot: {from: 0.6, to: 0.7, step: 0.1}}
exclude: [{method: magnitude, sparsity: [0.1, 0.5]}, {model: {outliers: true}}]
baselines: dense
seeds: [0, 1]
""")  # fmt: skip
    assert sweep.grid == {
        "model.outliers": [False, True], "model.dtype": ["float32"],
        "method": ["magnitude", "wanda", ["wanda", "dsnot"]], "sparsity": [0.1, 0.5, 0.9],
    }  # fmt: skip
    assert sweep.levels == {"wanda": [0.5], "wanda+dsnot": [0.6, 0.7]}
    assert sweep.exclude == [{"method": ["magnitude"], "sparsity": [0.1, 0.5]}, {"model.outliers": [True]}]
    assert (sweep.summary, sweep.paper, sweep.baselines, sweep.seeds) == ("one line", "wanda", ["dense"], [0, 1])
    assert not sweep.overridden


@given(start=st.integers(-50, 50), count=st.integers(1, 60), step=st.sampled_from([0.1, 0.05, 1, 0.3, -0.1, 1e-3]))
def test_a_range_has_its_end_and_never_more(start: int, count: int, step: float) -> None:
    first = start * 0.1
    last = first + (count - 1) * step
    values = spec.axis("x", {"from": first, "to": last, "step": step})
    assert len(values) == count
    assert values[-1] == pytest.approx(last, abs=1e-9)
    inside = spec.axis("x", {"from": first, "to": last + 0.9 * step, "step": step})
    assert inside == values, "an end that is not on the grid is not passed"


@pytest.mark.parametrize(
    "wrong",
    [
        "{from: 0.1, to: 0.9}", "{from: 0.1, to: 0.9, steps: 0.1}", "{from: a, to: 1, step: 1}",
        "{from: 0.1, to: 0.9, step: 0}", "{from: 0.9, to: 0.1, step: 0.1}", "{from: 0, to: .inf, step: 1}",
        "{from: 0, to: 1, step: 1.0e-9}", "{from: 0, to: .nan, step: 1}", "{from: false, to: 1, step: 1}", "[]",
    ],
)  # fmt: skip
def test_a_wrong_axis_is_named(wrong: str, mine: Path) -> None:
    heading, line = mistakes(mine, f"grid: {{sparsity: {wrong}}}")
    assert heading == "sweep own: 1 mistakes in its file"
    assert line.startswith("sparsity: ")


def test_all_mistakes_of_a_file_are_told_at_once(mine: Path) -> None:
    lines = mistakes(mine, """
gird: {}
grid: {sparsity: [], seed: [1], save: x}
levels: {wanda: [0.5, high], magnitude: 1.5}
exclude: [magnitude]
baselines: [1]
seeds: [-1]
paper: [a]
claims: [{id: a.b}, 3]
""")  # fmt: skip
    text = "\n".join(lines)
    for part in ("unknown key gird; did you mean 'grid'?", "seed: is written `seeds:`", "levels.wanda=high", "exclude:",
                 "baselines=[1]", "seeds=-1", "paper=['a']", "claims[0]", "claims[1]"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {}", "grid: is empty"),
        ("summary: x", "grid: is empty"),
        ("grid: [a]", "grid=['a']: must be a mapping"),
        ("- a", "own"),
        ("grid: {a: [1", "own"),
        ("grid: {a: ${nowhere}}", "own"),
        ("defaults: [nowhere]\ngrid: {a: 1}", "nowhere"),
        ("grid: {a: !!python/object:os.system {}}", "own"),
    ],
)
def test_a_file_that_is_no_sweep_is_one_message(text: str, said: str, mine: Path) -> None:
    assert said in " ".join(mistakes(mine, text))


def test_an_unknown_sweep_gets_the_closest_name() -> None:
    with pytest.raises(UserError, match=r"sweep wand: unknown sweep; did you mean 'wanda'\?"):
        spec.load(Workspace(), "wand")


def test_a_users_own_sweeps_come_first(mine: Path) -> None:
    sweep = load(mine, "grid: {method: dense}", name="wanda")
    assert sweep.grid == {"method": ["dense"]}
    assert {"wanda"} < set(spec.names(Workspace(mine))) | {"x"}


def test_a_defaults_list_is_composed(mine: Path) -> None:
    (mine / "sweeps" / "base.yaml").write_text("grid: {method: [dense], sparsity: [0.1, 0.2]}\nseeds: [4]\n")
    sweep = load(mine, "defaults: [base, _self_]\ngrid: {sparsity: [0.3]}\n")
    assert (sweep.grid, sweep.seeds) == ({"method": ["dense"], "sparsity": [0.3]}, [4])


def test_an_override_replaces_its_axis_and_levels(mine: Path) -> None:
    text = "grid: {method: [wanda, magnitude], sparsity: [0.1, 0.2]}\nlevels: {wanda: [0.5]}\nseeds: [0, 1]\n"
    sweep = load(mine, text, "sparsity=0.3,0.4", "seed=range(0,3)", "method=[wanda,dsnot],dense", "task.context=64")
    assert sweep.grid == {
        "method": [["wanda", "dsnot"], "dense"], "sparsity": [0.3, 0.4], "task.context": [64],
    }  # fmt: skip
    assert (sweep.levels, sweep.seeds, sweep.overridden) == ({}, [0, 1, 2], True)
    assert sweep.given == {"sparsity", "seed", "method", "task.context"}
    kept = load(mine, text, "method=wanda")
    assert (kept.grid["sparsity"], kept.levels) == ([0.1, 0.2], {"wanda": [0.5]})


@pytest.mark.parametrize(
    "word", ["store=x", "save=x", "force=true", "format=csv", "seed=-1", "seed=a", "+a=1", "~method", "a"]
)
def test_what_cannot_be_overridden_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=word.strip("+~").partition("=")[0]):
        spec.load(Workspace(), "wanda", [word])


def test_every_sweep_of_the_project_loads() -> None:
    workspace = Workspace()
    for name in spec.names(workspace):
        assert spec.load(workspace, name).summary, f"{name} has no summary for `list sweeps`"
