"""Mirrors local records to Weights & Biases: after the record is on disk, and again whenever it is asked for.

The store stays the truth. What a mirror has taken is noted in the store's ``tracking/`` shards, so that a sweep
can be mirrored later, or the rest of it after a failure; no failure of the service can fail or lose a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebench.declare import Declared, option
from sparsebench.errors import UserError
from sparsebench.results.store import Store
from sparsebench.settings import Group


@dataclass(frozen=True)
class TrackingOptions(Declared):
    """Options of ``tracking.*``."""

    mode: str = option(
        "offline", "offline writes files that `wandb sync` uploads", choices=("offline", "online", "disabled")
    )
    project: str = option("sparsebench", "project of the service")
    entity: str | None = option(None, "user or team of the service; none: the account's default")
    folder: str | None = option(None, "where the service's files go; none: <store>/tracking", unit="folder")


_KEYS = ("run_id", "attempt")  # the same in every row of a table

TRACKING = Group("tracking", "backend", ("none", "wandb"), TrackingOptions)


def mirror(words: Iterable[str], store: Store, sweep: str | None, config_dir: Path | None) -> Mirror | None:
    """The mirror that the ``tracking`` words ask for; None for none. UserError when its library is missing."""
    backend, options = TRACKING.chosen(list(words), "none", config_dir)
    if backend == "none":
        return None
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        raise UserError("tracking=wandb: the library is not installed; pip install 'sparsebench[tracking]'")
    return Mirror(options, store, sweep)


@dataclass
class Mirror:
    """Takes records one by one, each attempt once. ``problems``: what went wrong, by run id; ``fallen``: online did
    not answer, so this process goes on offline; ``taken``: run id -> newest attempt that was mirrored, to this project
    in this mode."""

    options: TrackingOptions
    store: Store
    sweep: str | None = None
    problems: dict[str, str] = field(default_factory=dict)
    fallen: bool = False
    taken: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [row for row in self.store.notes("tracking") if row.get("project") == self.options.project]
        rows = [row for row in rows if row.get("mode") == self.options.mode]
        self.taken |= {row["run_id"]: row["attempt"] for row in sorted(rows, key=lambda row: int(row["attempt"]))}

    @property
    def folder(self) -> Path:
        return Path(self.options.folder).expanduser() if self.options.folder else self.store.folder / "tracking"

    @property
    def mode(self) -> str:
        return "offline" if self.fallen else self.options.mode

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether this attempt was mirrored already."""
        return self.taken.get(record["run_id"], 0) >= int(record["attempt"])

    def push(self, record: Mapping[str, Any]) -> bool:
        """Mirrors one record with its configuration and per-layer table; False (and a problem) when it could not."""
        run_id, attempt = record["run_id"], record["attempt"]
        if self.has(record):
            return True
        try:
            self._push(record)
            note = {"run_id": run_id, "attempt": attempt, "project": self.options.project, "mode": self.mode}
            self.store.note("tracking", [note])
            self.taken[run_id] = attempt
        except Exception as error:  # whatever the service does is not the run's business
            self.problems[run_id] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return False
        return True

    def _push(self, record: Mapping[str, Any]) -> None:
        import wandb

        run = self._begin(record)
        try:
            layers = self.store.details("layers", record["run_id"], record["attempt"])
            for index, row in enumerate(layers):
                run.log({"layer/achieved": row.get("achieved")}, step=index)
            if layers:
                names: list[Any] = [*dict.fromkeys(key for row in layers for key in row if key not in _KEYS)]
                table = wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in layers])
                run.summary["layers"] = table
            run.summary.update({key: value for key, value in record.items() if value is not None})
        finally:
            run.finish(exit_code=0 if record["status"] == "ok" else 1)

    def _begin(self, record: Mapping[str, Any]) -> Any:
        """The service's run: its id is the run's, with the attempt where an earlier one was mirrored."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it looks for its vendor even when offline
        import wandb

        again = record["attempt"] > 1
        configs = self.store.details("configs", record["run_id"], record["attempt"])
        self.folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {
            "project": self.options.project,
            "entity": self.options.entity,
            "mode": self.mode,
            "group": self.sweep,
            "job_type": record.get("task"),
            "tags": [str(record[key]) for key in ("method", "model", "sparsity") if record.get(key) is not None],
            "id": record["run_id"] + (f"-{record['attempt']}" if again else ""),
            "name": f"{record.get('method')} {record.get('sparsity')} {record.get('model')} {record.get('task')}",
            "resume": "allow",
            "config": configs[0]["config"] if configs else {},
            "dir": str(self.folder),
            "settings": wandb.Settings(
                silent=True, init_timeout=20, console="off", x_disable_stats=True, x_disable_meta=True
            ),
        }
        try:
            return wandb.init(**about)
        except wandb.errors.CommError:
            if self.mode != "online":
                raise
            self.fallen = True
            return wandb.init(**about | {"mode": "offline"})

    def told(self) -> str:
        """What the user should know when all is done: problems, and how offline files are uploaded."""
        lines = [f"tracking: {run_id[:8]} was not mirrored: {why}" for run_id, why in self.problems.items()]
        if self.fallen:
            lines.append("tracking: the service did not answer, so the rest was written offline")
        if self.mode == "offline":
            lines.append(
                f"tracking: offline files in {self.folder}; upload: wandb sync {self.folder}/wandb/offline-run-*"
            )
        return "\n".join(lines)
