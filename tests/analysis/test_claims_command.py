"""The ledger and its verb, on a store that holds a planned sweep with made-up outcomes."""

from __future__ import annotations

import csv
import io
import json
from math import exp
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy
import pytest

from sparsebench.analysis import claims_command, ledger, outcomes
from sparsebench.config import Workspace
from sparsebench.errors import UserError
from sparsebench.results.store import Store
from sparsebench.sweep import plan as plans
from sparsebench.sweep import spec
from sparsebench.sweep.plan import Plan, Planned

LEVELS = {"dense": 0.0, "wanda": 0.2, "magnitude": 0.5, "random": 2.0}  # what each adds to the NLL


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return Workspace()


def planned(workspace: Workspace, store: Path, *words: str, name: str = "wanda") -> Plan:
    return plans.keep(plans.make(workspace, spec.load(workspace, name, words)), store)[0]


def make(store: Store, run: Planned, **changes: Any) -> None:
    """An ok record with 60 windows for one planned run; ``changes`` to its columns, ``rows`` to its samples,
    ``config`` to what it was made of."""
    noise = numpy.random.default_rng(0).normal(0, 0.05, (2, 60))
    own = noise[1] - noise[1].mean()
    nll = (
        3.0
        + LEVELS[run.point["method"]] * (0.5 + float(run.point["sparsity"] or 0))
        + noise[0]
        + 0.2 * LEVELS[run.point["method"]] * own
    )
    fields = {
        "metric": "perplexity", "perplexity": exp(nll.mean()), "nll": nll.mean(), "context": 512,
        "achieved": run.point["sparsity"], "flagged": False, "seconds_sparsify": 1.0,
    }  # fmt: skip
    rows = [{"sample": f"window/{at}", "nll": one} for at, one in enumerate(nll.tolist())]
    part = {"label": run.point["method"], "name": run.point["method"], "version": 1}
    config = {"methods": [part], "task": {"label": "perplexity", "name": "perplexity", "version": 1}}
    known = {key: run.point[key] for key in ("method", "model", "task", "sparsity", "seed")}
    attempt = store.begin(run.run_id, known)
    status = changes.pop("status", "ok")
    rows, config = changes.pop("rows", rows), changes.pop("config", config)
    attempt.finish(status, fields | changes, samples=rows, config=config)


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the sweep wanda, every run made. Read only."""
    found = Store(tmp_path_factory.mktemp("whole") / "store")
    for run in planned(workspace, found.folder).runs:
        make(found, run)
    return found.folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Store:
    """The test's own copy of it."""
    return Store(copytree(whole, tmp_path / "store"))


def claims(store: Store, workspace: Workspace, *names: str, **given: str) -> str:
    return claims_command.run(names, {"store": str(store.folder), **given}, Path("unused"), workspace)


def entries(store: Store, workspace: Workspace, *names: str) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in json.loads(claims(store, workspace, *names, format="json"))}


def test_a_sweep_that_ran(store: Store, workspace: Workspace) -> None:
    text = claims(store, workspace, "wanda")
    assert text.startswith(
        "wanda: 1 of 1 main claims expected at this scale reproduced\n  reproduced      wanda.beats_"
    )
    assert "60 samples, 1 seed: this model, this calibration\n" in text
    assert "wanda.beats_magnitude_plain, secondary, not expected at this scale, not counted" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    found = entries(store, workspace, "wanda")["wanda.beats_magnitude"]
    assert found["test"] == "nll(method=magnitude, calibration=null) > nll(method=wanda) for all sparsity"
    assert (found["verdict"], found["samples"], found["seeds"]) == ("reproduced", 60, 1)
    assert found["estimate"] == pytest.approx(0.3 * 0.875) and found["at"] == "sparsity=0.375"
    assert found["low"] < found["estimate"] < found["high"] and found["p_for_adjusted"] < 0.025
    assert len(found["parts"]) == 4 and found["published"]["right"] == 7.26


def test_every_paper_with_a_sweep_is_listed(store: Store, workspace: Workspace) -> None:
    table = list(csv.DictReader(io.StringIO(claims(store, workspace, format="csv"))))
    sweeps = [spec.load(workspace, name) for name in spec.names(workspace)]
    assert {row["paper"] for row in table} >= {sweep.paper for sweep in sweeps if sweep.paper}
    assert {row["id"] for row in table if row["id"]} == {claim.id for sweep in sweeps for claim in sweep.claims}
    others = [row for row in table if row["id"] and row["sweep"] != "wanda"]
    assert others and all(row["verdict"] == "untested" for row in others)
    assert all(row["why"] == f"no record: the sweep was not run (sweep {row['sweep']})" for row in others)
    assert all(row["why"] for row in table)


def test_nothing_was_ever_run(tmp_path: Path, workspace: Workspace) -> None:
    text = claims(Store(tmp_path / "none"), workspace)
    assert "untested)\n" in text and " papers: 0 of " in text and "  reproduced " not in text
    assert not (tmp_path / "none").exists()


def test_part_of_the_grid_is_said(tmp_path: Path, workspace: Workspace) -> None:
    store = Store(tmp_path / "store")
    for run in planned(workspace, store.folder, "sparsity=0.5,0.75").runs:
        make(store, run)
    found = entries(store, workspace, "wanda")["wanda.beats_magnitude"]
    assert found["verdict"] == "reproduced"
    assert found["scope"] == "this model, this calibration, without sparsity=0.375, 0.625"


def test_what_a_sweep_never_joins_is_not_missing(workspace: Workspace) -> None:
    """A claim over all methods of one protocol is whole without the methods that the sweep gives the other one."""
    sweep = spec.load(workspace, "sparse_frontier")
    (one,) = [claim for claim in sweep.claims if claim.id == "sparse_frontier.some_task_breaks"]
    assert "method" in one.for_each and one.select["task.protocol"] == "windows", "whatever the method"
    words = ["model=tiny_100k,tiny_400k", "method=vertical_slash,quest", "task.length=1024"]
    plan = plans.make(workspace, spec.load(workspace, sweep.name, words))
    assert ledger._left_out(sweep, one, plan) == "model=tiny_1m, tiny_4m and method=block_sparse, flexprefill"


def test_another_grid_leaves_a_claim_without_its_runs(tmp_path: Path, workspace: Workspace) -> None:
    store = Store(tmp_path / "store")
    planned(workspace, store.folder, "model=tiny_100k")
    found = entries(store, workspace, "wanda")["wanda.beats_magnitude"]
    assert found["verdict"] == "untested"
    assert found["why"] == "no record: no planned run gives sparsity a value (the nearest run has model=tiny_100k)"


def one_of(workspace: Workspace, store: Store, **point: Any) -> Planned:
    plan = plans.newest(store.folder, "wanda")
    assert plan is not None
    return next(run for run in plan.runs if all(run.point[key] == value for key, value in point.items()))


WANDA = {"method": "wanda", "sparsity": 0.5, "model.outliers": True}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"status": "failed", "error": "out of memory"}, None),
        ({"flagged": True, "achieved": 0.4}, "achieved sparsity is off: method=wanda, model=tiny_1m, sparsity=0.5, "),
        ({"rows": []}, "seed=0: its per-sample outcomes are missing"),
        ({"config": {"methods": [{"name": "wanda", "version": 0}]}}, "made by version 0 of wanda, which is now 1; run"),
    ],
)
def test_a_later_attempt(store: Store, workspace: Workspace, changes: dict[str, Any], why: str | None) -> None:
    """An ok record that was made again counts; one that failed later does not hide it."""
    make(store, one_of(workspace, store, **WANDA), **changes)
    found = entries(store, workspace, "wanda")["wanda.beats_magnitude"]
    assert found["verdict"] == ("untested" if why else "reproduced")
    assert why is None or why in found["why"]


def test_a_run_that_is_missing(store: Store, workspace: Workspace) -> None:
    run = one_of(workspace, store, **WANDA)
    shard = next((store.folder / "records").glob("*.jsonl"))
    lines = shard.read_text(encoding="utf-8").splitlines(keepends=True)
    shard.write_text("".join(line for line in lines if run.run_id not in line), encoding="utf-8")
    found = entries(store, workspace, "wanda")["wanda.beats_magnitude"]
    assert found["verdict"] == "untested"
    assert found["why"].startswith(
        "no record: method=wanda, model=tiny_1m, sparsity=0.5, task=perplexity, seed=0 (plan"
    )


def test_torn_lines(store: Store, workspace: Workspace) -> None:
    shard = next((store.folder / "records").glob("*.jsonl"))
    with open(shard, "a", encoding="utf-8") as file:
        file.write('{"run_id": "tor')
    assert claims(store, workspace, "wanda").endswith("1 torn lines of the store were skipped\n")


def test_samples_are_read_as_the_store_reads_them(store: Store, workspace: Workspace) -> None:
    run = one_of(workspace, store, **WANDA)
    make(store, run, rows=[{"sample": "window/0", "nll": 1.0}])
    for attempt in (1, 2):
        rows = outcomes.read(store, "samples", {run.run_id: attempt})[run.run_id]
        assert rows == store.details("samples", run.run_id, attempt)
    # Another process claims to have made the same attempt: the store knows which one counts.
    shard = next((store.folder / "samples").glob("*.jsonl"))
    line = json.dumps({"run_id": run.run_id, "attempt": 2, "sample": "window/9", "nll": 9.0})
    (shard.parent / "other.jsonl").write_text(line + "\n{torn", encoding="utf-8")
    assert outcomes.read(store, "samples", {run.run_id: 2})[run.run_id] == store.details("samples", run.run_id, 2)
    assert outcomes.read(store, "samples", {}) == {}


def test_missing_baselines_are_noted(tmp_path: Path, workspace: Workspace) -> None:
    store = Store(tmp_path / "store")
    planned(workspace, store.folder, "method=wanda")
    assert "note: sweep wanda: Baselines are missing: magnitude." in claims(store, workspace, "wanda")


def test_bad_input(tmp_path: Path, workspace: Workspace) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match="claims wand: no sweep of that paper; did you mean 'wanda'"):
        claims(store, workspace, "wand")
    with pytest.raises(UserError, match="format=xml: unknown format; valid: csv, json, table"):
        claims(store, workspace, format="xml")
    with pytest.raises(UserError, match="claims: takes only store=<folder> and format=, not method"):
        claims(store, workspace, method="wanda")


def test_a_sweep_without_claims(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    text = "paper: mine\ngrid: {method: [wanda], model: [tiny_100k]}\nbaselines: [dense]\n"
    (tmp_path / "sweeps" / "mine.yaml").write_text(text, encoding="utf-8")
    own = Workspace(tmp_path)
    out = claims(Store(tmp_path / "store"), own, "mine")
    assert out.startswith("mine: the sweep states no claims\n")
    assert "note: sweep mine: Baselines are missing: magnitude, random." in out
    assert (
        json.loads(claims(Store(tmp_path / "store"), own, "mine", format="json"))[0]["why"]
        == "the sweep states no claims"
    )
    found = ledger.build(own, Store(tmp_path / "store"), ["mine"])
    assert found.headline("mine") == (0, 0, 0) and "mine" in found.papers
