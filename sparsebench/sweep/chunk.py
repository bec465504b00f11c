"""A worker's share of a plan: made of plain strings, so that it can be pickled, queued and started again.

Runs of one chunk share what the experiment keeps between runs: the sparse model of several tasks, and
everything that was imported. A run that is done or that somebody else holds is skipped, so starting a
chunk again goes on where it ended.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.errors import UserError
from sparsebench.sweep.lease import Leases
from sparsebench.sweep.plan import Planned


@dataclass
class Chunk:
    """``runs``: JSON texts [run id, words]; ``job``: what the queue calls this chunk."""

    store: str
    config_dir: str | None
    runs: list[str]
    job: str | None = None

    @classmethod
    def of(cls, store: Path, config_dir: Path | None, runs: Sequence[Planned]) -> Chunk:
        texts = [json.dumps([run.run_id, list(run.words)]) for run in runs]
        return cls(str(store), str(config_dir) if config_dir else None, texts)

    def __call__(self) -> dict[str, str]:
        """Makes the runs, one after the other; run id -> status. One run's failure touches no other."""
        from sparsebench.config import Workspace
        from sparsebench.experiment import Experiment
        from sparsebench.results.store import Store

        store = Store(Path(self.store))
        leases = Leases(store.folder, self.job)
        experiment = Experiment(Workspace(Path(self.config_dir) if self.config_dir else None), store)
        statuses: dict[str, str] = {}
        for text in self.runs:
            run_id, words = json.loads(text)
            known = store.find(run_id)
            if known and known["status"] == "ok":
                statuses[run_id] = "ok"
            elif leases.take(run_id):
                statuses[run_id] = self._one(experiment, run_id, words)
                leases.release(run_id)
        return statuses

    def _one(self, experiment: Any, run_id: str, words: Sequence[str]) -> str:
        """One run; what cannot even begin here (a model that this machine cannot load) is recorded too."""
        from sparsebench.config import runs

        try:
            (run,) = runs(experiment.workspace, words)
            return str(experiment.run(run)["status"])
        except (UserError, OSError, MemoryError) as error:
            attempt = experiment.store.begin(run_id, {"error": str(error)})
            attempt.finish("failed", {"error": f"{type(error).__name__}: {error}"}, error=traceback.format_exc())
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
