"""From words to validated runs: what composes, what stacks, what a grid is, and nothing but UserError."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebench.config import RUN_OPTIONS, Workspace, runs
from sparsebench.declare import Option
from sparsebench.errors import UserError
from sparsebench.rules import level_of, unmet
from sparsebench.run import Run

CONTENT = "0" * 64
WORKSPACE = Workspace()


def one(*words: str) -> Run:
    (run,) = runs(WORKSPACE, words)
    return run


def test_nothing_said_is_wanda_on_the_embedded_model_and_real_text() -> None:
    run = one()
    assert (run.label, run.model.label, run.task.label, run.sparsity) == ("wanda", "tiny_1m", "perplexity", 0.5)
    assert run.calibration is not None
    assert (run.calibration.label, run.corpus and run.corpus.name) == ("kjv", "kjv")


def test_calibration_follows_the_model_unless_it_is_given() -> None:
    papers = one("model=llama2_7b").calibration
    chosen = one("model=llama2_7b", "calibration=kjv", "calibration.nsamples=3").calibration
    assert papers is not None and papers.label == "c4"
    assert chosen is not None and (chosen.label, chosen.options["nsamples"]) == ("kjv", 3)
    assert one("method=magnitude").calibration is None


def test_a_stack_keeps_its_order_and_each_methods_own_options(toys: Path) -> None:
    words = ["method=[largest,keeps_mask]", "sparsity=0.3", "method.largest.sparsity=0.7", "method.keeps_mask.rounds=2"]
    (run,) = runs(Workspace(toys), words)
    assert run.label == "largest+keeps_mask"
    assert run.methods[0].options["sparsity"] == 0.7
    assert run.methods[1].changed == {"rounds": 2}
    with pytest.raises(UserError, match="needs a selecting method before it"):
        runs(Workspace(toys), ["method=[keeps_mask,largest]"])


def test_a_methods_own_level_wins_over_the_runs() -> None:
    run = one("method=magnitude", "sparsity=0.3", "method.magnitude.sparsity=0.7")
    assert run.sparsity == 0.7
    assert one("method=magnitude", "method.magnitude.pattern=1:4").sparsity == 0.75
    assert one("method=magnitude", "pattern=1:4", "method.magnitude.pattern=2:4").pattern == "2:4"
    assert one("method=dense", "sparsity=0.3").sparsity is None


@pytest.mark.parametrize(("pattern", "level"), [("2:4", 0.5), ("1:4", 0.75), ("7:8", 0.125), ("1:64", 63 / 64)])
def test_a_pattern_implies_its_level(pattern: str, level: float) -> None:
    assert level_of("sparsity", None, pattern) == level
    assert level_of("sparsity", level, pattern) == level


def test_tasks_make_one_run_each_on_one_sparse_model() -> None:
    found = runs(WORKSPACE, ["method=magnitude", "task=[perplexity,tinyworld]", "task.context=64", "task.samples=2"])
    assert [run.task.label for run in found] == ["perplexity", "tinyworld"]
    assert found[0].task.options["context"] == 64  # an option applies where it exists
    assert len({run.sparse_model_id(CONTENT) for run in found}) == 1
    assert len({run.run_id(CONTENT) for run in found}) == 2


def test_an_option_that_no_task_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.nonsense"):
        runs(WORKSPACE, ["task=[perplexity,tinyworld]", "task.nonsense=1"])


@pytest.mark.parametrize(
    ("words", "say"),
    [
        ("method=block_sparse pattern=2:4", "pattern=2:4: has no effect here: method=block_sparse takes no pattern"),
        ("method=rtn sparsity=0.3", "sparsity=0.3: has no effect here: method=rtn takes no sparsity"),
        (
            "method=local_sink sparsity=0.3 method.local_sink.n_local=9",
            "sparsity=0.3: has no effect here: method.local_sink.n_local=9 is given instead",
        ),
        ("method=dense task=sf_vt task.max_new=9", "task.max_new=9: has no effect here: goes with task.form=natural"),
        ("method=dense task=sf_vt task.num_queries=9", "goes with task.name=niah|story_retrieval"),
        ("method=dense task=tinyworld task.tasks=[copy] task.hops=3", "goes with task.tasks=variable_tracking"),
    ],
)
def test_what_has_no_effect_is_refused(words: str, say: str) -> None:
    with pytest.raises(UserError, match=re.escape(say)):
        runs(WORKSPACE, words.split())


def test_what_has_an_effect_on_a_part_of_a_grid_leaves_the_rest_as_it_was() -> None:
    words = ["method=wanda,block_sparse", "pattern=2:4", "task=sf_niah,sf_vt", "task.num_queries=3"]
    found = {(run.label, run.task.label): run for run in runs(WORKSPACE, words, sweep=True)}
    assert [run.pattern for run in found.values()] == ["2:4", "2:4", "unstructured", "unstructured"]
    assert found["wanda", "sf_niah"].task.options["num_queries"] == 3
    assert found["wanda", "sf_vt"].task == one("method=wanda", "task=sf_vt").task
    assert one("method=dense", "task=sf_vt", "task.protocol=windows").task.changed == {"name": "vt"}


def test_a_grid_is_every_combination() -> None:
    words = ["method=magnitude,wanda", "sparsity=0.3,0.5,0.7", "seed=range(0,2)", "method.wanda.norm=l1"]
    found = runs(WORKSPACE, words, sweep=True)
    assert len(found) == 12
    assert {(run.label, run.sparsity, run.options.seed) for run in found} == {
        (method, level, seed) for method in ("magnitude", "wanda") for level in (0.3, 0.5, 0.7) for seed in (0, 1)
    }
    assert all(run.methods[0].options["norm"] == "l1" for run in found if run.label == "wanda")


# -- random configurations -------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    [
        *("", "abc", "nan", "inf", "null", "true", "-1", "0.5", "1e400", "2:4", "5:4", "[1,2]", "[]", "{a:1}"),
        *("'it''s'", "a b", "${x}", "\\", "é", "!!python/object:os.system", "os.system", "0x10", "1_0", "٣", "*"),
        *("range(0,3)", "choice(a,b)"),
    ]
)
KEYS = [
    *RUN_OPTIONS,
    *(f"method.wanda.{key}" for key in WORKSPACE.catalogue.get("method", "wanda").options),
    *(f"model.{key}" for key in WORKSPACE.catalogue.get("model", "ladder").options),
    *(f"calibration.{key}" for key in WORKSPACE.catalogue.get("corpus", "kjv").options),
    *(f"task.{key}" for key in WORKSPACE.catalogue.get("task", "perplexity").options),
]
NAMES = [
    "method",
    "model",
    "task",
    "calibration",
    "hydra",
    "_target_",
    "method.wanda",
    "method.wanda._target_",
    "x.y.z",
]


def spec_of(key: str) -> Option:
    group, _, name = key.rpartition(".")
    places = {
        "method.wanda": ("method", "wanda"),
        "model": ("model", "ladder"),
        "calibration": ("corpus", "kjv"),
        "task": ("task", "perplexity"),
    }
    kind, declared = places.get(group, ("", ""))
    return WORKSPACE.catalogue.get(kind, declared).options[name] if kind else RUN_OPTIONS[name]


def valid_values(key: str) -> st.SearchStrategy[str]:
    """Words that the declaration of ``key`` allows."""
    spec = spec_of(key)
    base = spec.type.removesuffix(" | None")
    if key.endswith(("pattern", "sparsity")):  # they can contradict each other; each has a test of its own
        return st.just("null")
    if spec.choices is not None:
        return st.sampled_from(list(map(str, spec.choices)))
    low = spec.low if spec.low is not None else 0
    if base == "int":
        return st.integers(int(low), int(spec.high) if spec.high is not None else 10_000).map(str)
    if base == "float":
        return st.floats(low, spec.high if spec.high is not None else 1e6).map(repr)
    if base == "bool":
        return st.sampled_from(["true", "false"])
    return st.just("null") if spec.default is None else st.just(str(spec.default)) if base == "str" else st.just("[a]")


KEPT = [
    key for key in KEYS if key not in ("task.corpus", "save_as", "streamed", "activations")
]  # these need others with them
VALID = st.lists(st.sampled_from(KEPT), unique=True, max_size=6).flatmap(
    lambda keys: st.tuples(*(valid_values(key).map(lambda value, key=key: f"{key}={value}") for key in keys))
)
ANY = st.lists(
    st.one_of(
        st.builds(lambda key, value: f"{key}={value}", st.sampled_from([*KEYS, *NAMES]), TEXTS),
        st.builds(
            lambda key, value: f"{key}={value}",
            st.sampled_from(KEYS),
            st.one_of(st.integers().map(str), st.floats().map(repr), st.booleans().map(str)),
        ),
        st.text(max_size=12),
    ),
    max_size=4,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@QUICK
@given(ANY, st.booleans())
def test_any_words_are_runs_or_one_line(words: list[str], sweep: bool) -> None:
    try:
        found = runs(WORKSPACE, words, sweep=sweep)
    except UserError as error:
        assert str(error).strip()
        return
    for run in found:
        assert len(run.run_id(CONTENT)) == 16


@QUICK
@given(VALID, st.randoms(use_true_random=False))
def test_valid_words_hash_stably_in_any_order(words: tuple[str, ...], shuffle: random.Random) -> None:
    first = one(*words)
    again = list(words)
    shuffle.shuffle(again)
    second = one(*again)
    assert first.run_id(CONTENT) == second.run_id(CONTENT)
    assert first.sparse_model_id(CONTENT) == second.sparse_model_id(CONTENT)
    plain: dict[str, Any] = first.to_dict()
    assert plain["methods"][0]["label"] == "wanda"


@pytest.mark.parametrize(
    ("condition", "options", "missing"),
    [
        ("", {}, None),
        ("a=x", {"a": "x"}, None),
        ("a=x|y and b=true", {"a": "y", "b": False}, "b=true"),
        ("a=x|y", {"a": ("z", "y")}, None),
        ("a|b=x", {"a": "z", "b": "x"}, None),
        ("a|b=x", {"a": "z", "b": "z"}, "a|b=x"),
        ("a", {"a": 0}, "a"),
        ("a", {"a": "v100_16"}, None),
    ],
)
def test_what_a_condition_still_needs(condition: str, options: dict[str, object], missing: str | None) -> None:
    assert unmet(condition, options) == missing
