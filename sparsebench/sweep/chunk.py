"""A worker's share of a plan: made of plain strings, so that it can be pickled, queued and started again.

Runs of one chunk share what the experiment keeps between runs: the sparse model of several tasks, and
everything that was imported. A run that is done, that was tried since the chunk was made, or that somebody
else holds is skipped, so starting a chunk again goes on where it ended.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebench.errors import UserError
from sparsebench.results.tail import Tail
from sparsebench.sweep.lease import Leases
from sparsebench.sweep.plan import Planned

if TYPE_CHECKING:
    from sparsebench.results.store import Store
    from sparsebench.results.tracking import Mirror


@dataclass
class Chunk:
    """``runs``: JSON texts [run id, words, attempts that had ended]; ``job``: what the queue calls this chunk;
    ``requeued``: the environment variable in which the queue counts how often it started the chunk again;
    ``tracking``: the sweep's name and the words that say where records are mirrored, [] for nowhere."""

    store: str
    config_dir: str | None
    runs: list[str]
    job: str | None = None
    requeued: str | None = None
    tracking: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, store: Path, config_dir: Path | None, runs: Sequence[Planned], attempts: Mapping[str, int] | None = None
    ) -> Chunk:
        """``attempts``: the newest ended attempt of each run, so that nobody else's failure is made again."""
        known = attempts or {}
        texts = [json.dumps([run.run_id, list(run.words), known.get(run.run_id, 0)]) for run in runs]
        return cls(str(store.resolve()), str(config_dir) if config_dir else None, texts)

    def __call__(self) -> dict[str, str]:
        """Makes the runs, one after the other; run id -> status. One run's failure touches no other."""
        store = Path(self.store)
        leases, tail = Leases(store, self.job, again=self._restarts() > 0), Tail(store)
        experiment = self._experiment()
        mirrored = self._mirror(experiment.store) if self.tracking else None
        statuses: dict[str, str] = {}
        for text in self.runs:
            run_id, words, attempts = json.loads(text)
            if self._is_open(tail, run_id, attempts) and leases.take(run_id):
                try:  # its last owner may have finished it while we looked, so look again
                    if self._is_open(tail, run_id, attempts):
                        statuses[run_id] = self._one(experiment, run_id, words)
                        if mirrored is not None and not mirrored.push(experiment.store.find(run_id)):
                            print(f"tracking: {run_id}: {mirrored.problems[run_id]}", file=sys.stderr)
                finally:
                    leases.release(run_id)
        return statuses

    def run_ids(self) -> list[str]:
        return [json.loads(text)[0] for text in self.runs]

    def _is_open(self, tail: Tail, run_id: str, attempts: int) -> bool:
        tail.look()
        line = tail.best.get(run_id)
        return line is None or (line["status"] != "ok" and tail.attempt(run_id) <= attempts)

    def _experiment(self) -> Any:
        from sparsebench.config import Workspace
        from sparsebench.experiment import Experiment
        from sparsebench.results.store import Store

        workspace = Workspace(Path(self.config_dir) if self.config_dir else None)
        extra = {"job": self.job, "restarts": self._restarts()} if self.job else {}
        return Experiment(workspace, Store(Path(self.store)), extra=extra)

    def _mirror(self, store: Store) -> Mirror | None:
        from sparsebench.results.tracking import mirror

        return mirror(self.tracking[1:], store, self.tracking[0], Path(self.config_dir) if self.config_dir else None)

    def _restarts(self) -> int:
        return int(os.environ.get(self.requeued) or 0) if self.requeued else 0

    def _one(self, experiment: Any, run_id: str, words: Sequence[str]) -> str:
        """One run; what cannot even begin here (a model that this machine cannot load) is recorded too."""
        from sparsebench.config import runs

        named: dict[str, Any] = {}
        try:
            (run,) = runs(experiment.workspace, words)
            named = {"method": run.label, "model": run.model.label, "task": run.task.label}
            named |= {"sparsity": run.sparsity, "pattern": run.pattern, "seed": run.seed}
            return str(experiment.run(run)["status"])
        except Exception as error:  # whatever keeps a run from beginning is its record's business
            attempt = experiment.store.begin(run_id, named)  # UserError if it was the store that refused
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            attempt.finish("failed", {"error": " ".join(message.split())[:300]}, error=traceback.format_exc())
            return "failed"

    def checkpoint(self) -> Any:
        """What Slurm's pre-emption asks for: the same chunk again; finished runs are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Chunk:
        return cls(**json.loads(text))


def main(file: str) -> int:
    """``python -m sparsebench.sweep.chunk <file>``: the worker process of the local launcher."""
    Chunk.from_json(Path(file).read_text(encoding="utf-8"))()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
