"""Run identity: what changes an id, what never does, and a committed table that ids are held to.

``python tests/test_identity.py`` writes the table anew; it refuses where a version must be raised first.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsebench.config import Workspace, runs
from sparsebench.declare import KINDS
from sparsebench.run import Run

TABLE = Path(__file__).parent / "data" / "identities.json"
WORKSPACE = Workspace()
CONTENT = "0" * 64  # instead of the hash of a model's files
RUNS = [
    "",
    "method=dense",
    "method=given",
    "method=magnitude",
    "method=random seed=3",
    "method=wanda sparsity=0.7",
    "method=wanda pattern=2:4",
    "method=wanda method.wanda.norm=l1 calibration.nsamples=16",
    "method=magnitude method.magnitude.group=global model=tiny_100k model.outliers=true",
    "method=wanda model=llama2_7b task=wikitext2",
    "method=magnitude task=tinyworld task.length=512",
    "method=magnitude task=perplexity task.protocol=continuation",
    "method=dense task=zero_shot model=opt_125m",
]


def one(words: str | list[str]) -> Run:
    (run,) = runs(WORKSPACE, words.split() if isinstance(words, str) else words)
    return run


def ids(words: str) -> list[str]:
    run = one(words)
    return [run.run_id(CONTENT), run.sparse_model_id(CONTENT)]


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def corpus_digest(name: str) -> str:
    """What an embedded corpus gives: the first and last documents of its splits."""
    documents = [
        WORKSPACE.catalogue.load("corpus", name)().documents(split) for split in ("train", "validation", "test")
    ]
    text = "\0".join(part for split in documents for part in (*split[:3], *split[-3:], str(len(split))))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def declarations() -> dict[str, dict[str, Any]]:
    """kind/name -> version, declared defaults, and for embedded corpora a digest of their texts."""
    found = WORKSPACE.catalogue.found
    table = {}
    for kind in KINDS:
        for name, one in sorted(found[kind].items()):
            defaults = {key: plain(spec.default) for key, spec in sorted(one.options.items())}
            table[f"{kind}/{name}"] = {"version": one.version, "defaults": defaults}
    for name in ("kjv", "tinyworld"):
        table[f"corpus/{name}"]["text"] = corpus_digest(name)
    return table


def changes(known: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """What changed without a raised version: ids of old records would now stand for something else."""
    wrong = []
    for key, entry in known.items():
        if key not in now:
            continue  # a declaration that went away has no new runs
        raised = now[key]["version"] > entry["version"]
        if now[key]["version"] < entry["version"]:
            wrong.append(f"{key}: version fell from {entry['version']} to {now[key]['version']}")
        for option, default in entry["defaults"].items():
            if option not in now[key]["defaults"]:
                what = f"option {option} is gone"
            elif now[key]["defaults"][option] != default:
                what = f"default of {option} was {default!r}, is {now[key]['defaults'][option]!r}"
            else:
                continue
            if not raised:
                wrong.append(f"{key}: {what}: raise its version={entry['version']} in the declaration")
        if entry.get("text") != now[key].get("text") and not raised:
            wrong.append(f"{key}: its texts changed: raise its version={entry['version']} in the declaration")
    return wrong


def table() -> dict[str, Any]:
    return {"runs": {words: ids(words) for words in RUNS}, "declarations": declarations()}


WHAT_TO_DO = (
    "\nIf results can change, raise `version` of what changed. Then `python tests/test_identity.py` writes the table "
    "anew; commit it with the change."
)


def test_nothing_changed_under_an_old_version() -> None:
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    wrong = changes(known["declarations"], declarations())
    assert not wrong, "\n".join(wrong) + WHAT_TO_DO


def test_the_table_is_complete() -> None:
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    now = declarations()
    new = [key for key in now if known["declarations"].get(key) != now[key]]
    assert not new, f"new or raised: {', '.join(new)}.{WHAT_TO_DO}"


@pytest.mark.parametrize("words", RUNS)
def test_ids_are_those_of_the_table(words: str) -> None:
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    message = f"`{words}` has other ids than before: records in users' stores would no longer be found.{WHAT_TO_DO}"
    assert ids(words) == known["runs"].get(words), message


def test_the_table_notices_changes() -> None:
    entry = {"version": 1, "defaults": {"a": 1, "b": None}, "text": "x"}
    known = {"method/m": entry}
    assert changes(known, {"method/m": entry}) == []
    assert changes(known, {"method/m": entry | {"defaults": {"a": 1, "b": None, "new": 3}}}) == []  # ids are kept
    assert len(changes(known, {"method/m": entry | {"defaults": {"a": 2, "b": None}}})) == 1
    assert len(changes(known, {"method/m": entry | {"defaults": {"a": 1}}})) == 1
    assert len(changes(known, {"method/m": entry | {"text": "y"}})) == 1
    assert len(changes(known, {"method/m": entry | {"version": 0}})) == 1
    assert changes(known, {"method/m": entry | {"version": 2, "defaults": {}, "text": "y"}}) == []


@pytest.mark.parametrize(
    "word",
    [
        *"model.device=cpu batch_size=3 threads=2 store=elsewhere save=folder force=true format=json".split(),
        "method.wanda.norm=l2",
        "task.split=test",
        "sparsity=0.50",
        "sparsity=5e-1",
        "sparsity=.5",
        "seed=0",
    ],
)
def test_never_part_of_an_id(word: str) -> None:
    assert ids(
        f"method=wanda sparsity=0.5 {word}" if not word.startswith("sparsity") else f"method=wanda {word}"
    ) == ids("method=wanda sparsity=0.5")


@pytest.mark.parametrize(
    ("base", "word"),
    [
        ("method=wanda", "sparsity=0.6"),
        ("method=wanda", "sparsity=0.500000000001"),
        ("method=wanda", "pattern=2:4"),
        ("method=wanda", "seed=1"),
        ("method=random", "seed=1"),
        ("method=wanda", "calibration=tinyworld"),
        ("method=wanda", "calibration.nsamples=64"),
        ("method=wanda", "calibration.seqlen=128"),
        ("method=wanda", "method.wanda.norm=l1"),
        ("method=wanda", "method.wanda.exclude=[*q_proj]"),
        ("method=magnitude", "model.outliers=true"),
        ("method=magnitude model.outliers=true", "model.outliers_sigma=2.0"),
        ("method=dense model=hf model.path=x/y", "model.dtype=float16"),
        ("method=dense model=hf model.path=x/y", "model.attn_implementation=eager"),
    ],
)
def test_part_of_both_ids(base: str, word: str) -> None:
    before, after = ids(base), ids(f"{base} {word}")
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    "word", ["task.context=64", "task.split=validation", "task.corpus=tinyworld", "task=tinyworld"]
)
def test_part_of_the_run_id_alone(word: str) -> None:
    before, after = ids("method=wanda"), ids(f"method=wanda {word}")
    assert before[0] != after[0]
    assert before[1] == after[1]


@pytest.mark.parametrize("word", ["seed=1", "calibration=tinyworld", "sparsity=0.3"])
def test_unused_is_not_part_of_an_id(word: str) -> None:
    assert ids("method=dense") == ids(f"method=dense {word}")


def test_magnitude_uses_neither_seed_nor_calibration() -> None:
    assert ids("method=magnitude") == ids("method=magnitude seed=7 calibration=tinyworld")
    assert one("method=magnitude seed=7").seed is None
    assert one("method=random seed=7").seed == 7


def test_rounded_to_12_digits() -> None:
    assert ids("method=magnitude sparsity=0.3") == ids("method=magnitude sparsity=0.30000000000000004")


def test_the_content_of_the_model_counts_and_its_place_does_not() -> None:
    here, there = (one(f"method=dense model=hf model.path={path}") for path in ("a/b", "c/d"))
    assert here.run_id(CONTENT) == there.run_id(CONTENT)
    assert here.run_id(CONTENT) != here.run_id("1" * 64)


def test_another_name_for_the_same_thing_is_the_same_run() -> None:
    assert ids("task=wikitext2") == ids("task=perplexity task.corpus=wikitext2")
    assert ids("method=wanda pattern=2:4") == ids("method=wanda pattern=2:4 sparsity=0.5")


if __name__ == "__main__":
    old = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"declarations": {}}
    if problems := changes(old["declarations"], declarations()):
        sys.exit("\n".join(problems))
    TABLE.write_text(json.dumps(table(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
