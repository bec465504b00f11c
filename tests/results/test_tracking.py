"""The mirror on Weights & Biases: offline files hold what the store holds, and no failure of it fails a run."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

wandb = pytest.importorskip("wandb")

from commands import Command  # noqa: E402

from sparsebench.cli import main  # noqa: E402

WORDS = ["method=magnitude", "model=tiny_100k", "task.windows=1", "task.context=64"]
BLOCK, HEAD = 32768, 7


def written(folder: Path) -> Iterator[Any]:
    """The protobuf records of an offline file: a 7-byte head, then blocks of (checksum, length, kind, piece)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, at, pieces = file.read_bytes(), HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEAD])
        if at + HEAD + length > len(data):  # still being written
            return
        pieces += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def mirrored(folder: Path) -> dict[str, Any]:
    """Configuration, summary, curve, id and group of one offline run, which the service may still be writing."""
    found: dict[str, Any] = {"summary": {}, "curve": []}
    for _ in range(100):
        records = list(written(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.2)
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "group": record.run.run_group, "tags": list(record.run.tags)}
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if kind == "summary":
            update = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.summary.update}
            found["summary"] |= update
        if kind == "history":
            row = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            found["curve"].append(row.get("layer/achieved"))
    return found


def offline_runs(store: Path) -> list[Path]:
    return sorted((store / "tracking" / "wandb").glob("offline-run-*"))


def test_an_offline_mirror_holds_the_record(command: Command, tmp_path: Path) -> None:
    answer = command(*WORDS, "sparsity=0.5", "tracking=wandb")
    assert answer.code == 0, answer.err
    assert "wandb sync" in answer.err
    (record,) = answer.store.records()
    (folder,) = offline_runs(answer.store.folder)
    found = mirrored(folder)
    assert found["id"] == record["run_id"]
    assert found["config"]["methods"][0]["name"] == "magnitude"
    for column in ("perplexity", "achieved", "status", "flops_prefill"):
        assert found["summary"][column] == record[column]
    layers = answer.store.details("layers", record["run_id"], 1)
    assert found["curve"] == [row["achieved"] for row in layers]
    (table,) = folder.glob("files/media/table/*.json")
    assert len(json.loads(table.read_text())["data"]) == len(layers)
    answer = command(*WORDS, "sparsity=0.5", "tracking=wandb")
    assert answer.code == 0
    assert len(offline_runs(answer.store.folder)) == 1, "mirrored once"


def test_a_service_that_fails_fails_no_run_and_track_catches_up(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "mine" / "sweeps" / "small.yaml"
    sweep.parent.mkdir(parents=True)
    sweep.write_text(
        "summary: small\ngrid: {method: [magnitude], model: tiny_100k, task: perplexity, task.windows: 1, "
        "task.context: 64, sparsity: [0.5, 0.6]}\n"
    )
    words = ["sweep", "small", "--config-dir", str(sweep.parents[1]), "cluster=inline"]

    def refuses(**_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(wandb, "init", refuses)
        answer = command(*words, "tracking=wandb")
    assert answer.code == 0, answer.err
    assert "was not mirrored: OSError: no space left" in answer.err
    assert {record["status"] for record in answer.store.records()} == {"ok"}
    answer = command("track", "small")
    assert answer.code == 0, answer.err
    assert "2 runs mirrored now, 0 before" in answer.err
    assert {mirrored(folder)["group"] for folder in offline_runs(answer.store.folder)} == {"small"}
    assert "0 runs mirrored now, 2 before" in command("track", "small").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tracking=mlflow"], "tracking=mlflow: unknown backend"),
        (["tracking=wandb", "tracking.mode=sometimes"], "tracking.mode=sometimes"),
        (["tracking.colour=red"], "tracking.colour: unknown option of tracking"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, *words]) == 2
    assert message in capsys.readouterr().err


def test_tracking_an_unknown_sweep_is_a_mistake(command: Command) -> None:
    answer = command("track", "nothing")
    assert answer.code == 2
    assert "has no plan of that name" in answer.err
