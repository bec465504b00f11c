"""Chunks as array jobs of a Slurm cluster, submitted through submitit.

What was submitted lies in the store: ``jobs/<sweep>/slurm/<array>/`` holds ``chunks.json`` (written before the
submission), submitit's files and the logs. The Slurm job carries the array's name, so the queue itself says
what became of a chunk (``<array>_<index>``), and a launcher that starts again finds its jobs. Slurm is asked
through one ``squeue`` per look and never through submitit's results, which wait for dead jobs one by one.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebench.errors import UserError, closest
from sparsebench.results.store import vanished
from sparsebench.sweep.chunk import Chunk
from sparsebench.sweep.launch import ClusterOptions

# Every other state means that the job runs, will run, or runs again after a requeue.
DEAD = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
_MAX_ARRAY_SIZE = 1001  # Slurm's default
_ANSWER_S = 60  # seconds that a command of Slurm may take to answer
_CANCEL_ROUNDS = 20


@dataclass(frozen=True)
class Task:
    """One array task in the queue: Slurm's id (``123_4``), its state, and why it waits."""

    id: str
    state: str
    reason: str = ""


@dataclass
class Queue:
    """All arrays of one store, and what ``squeue`` says of their tasks as of the last look."""

    jobs: Path  # <store>/jobs
    tasks: dict[str, Task] = field(default_factory=dict)  # <array>_<index> -> task
    known: set[str] = field(default_factory=set)  # arrays that had reached the queue before the last look
    ended: set[str] = field(default_factory=set)  # arrays without a task that can still run

    def look(self) -> None:
        """Asks the queue once. When it does not answer, what it said last still holds."""
        folders = {file.parent.name: file.parent for file in self.jobs.glob("*/slurm/*/chunks.json")}
        self.ended |= {name for name in folders.keys() - self.ended if (folders[name] / "ended").exists()}
        asked = sorted(folders.keys() - self.ended)
        # Noted before the question: an array that arrives while it is answered must not look dead.
        arrived = {name for name in asked if (folders[name] / "arrived").exists()}
        found = self._ask(asked)
        if found is None:
            return
        self.tasks |= found
        self.known = arrived | {job.rpartition("_")[0] for job in found}
        running = {job.rpartition("_")[0] for job, task in found.items() if task.state not in DEAD}
        for name in self.known - running:
            (folders[name] / "ended").touch()
            self.ended.add(name)
        for job in self.tasks.keys() - found.keys():  # forgotten by Slurm, which it does to dead jobs only
            self.tasks[job] = Task(self.tasks[job].id, "COMPLETED") if self.is_alive(job) else self.tasks[job]

    def _ask(self, arrays: Sequence[str]) -> dict[str, Task] | None:
        if not arrays:
            return {}
        try:
            answer = _slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%j", f"--name={','.join(arrays)}")
        except UserError:
            return None
        found = {}
        for line in answer.splitlines():
            number, state, reason, name = line.strip().split("|", 3)
            found[f"{name}_{number.partition('_')[2] or 0}"] = Task(number, state, reason)
        return found

    def is_alive(self, job: str) -> bool:
        """Whether the task waits, runs, or will run again."""
        return job in self.tasks and self.tasks[job].state not in DEAD

    def gone(self, owner: Mapping[str, Any]) -> bool:
        """Whether the owner of a lease, or the writer of a record line, is known to be gone. Of a job in this
        store's arrays only the queue decides: one that was requeued goes on by itself."""
        job = str(owner.get("job"))
        array = job.rpartition("_")[0]
        if array in self.ended or array in self.known:
            return not self.is_alive(job)
        return not (self._is_ours(array)) and vanished(owner)

    def _is_ours(self, array: str) -> bool:
        return bool(array) and any(self.jobs.glob(f"*/slurm/{array}"))


@dataclass
class Slurm:
    """The launcher of one sweep: its chunks are tasks of arrays that outlive this process."""

    store: Path
    sweep: str
    options: ClusterOptions
    queue: Queue
    array_size: int = _MAX_ARRAY_SIZE

    @classmethod
    def of(cls, store: Path, sweep: str, options: ClusterOptions) -> Slurm:
        """UserError, before anything is submitted, when this machine cannot submit to that partition."""
        check_commands()
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UserError("cluster=slurm: needs submitit: pip install 'sparsebench[cluster]'") from None
        known = sorted(set(_slurm("sinfo", "-h", "-a", "-o", "%R").split()))
        for partition in options.partition.split(",") if options.partition else ():
            if partition not in known:
                raise UserError(
                    f"cluster.partition={partition}: Slurm has no such partition{closest(partition, known)}"
                )
        limit = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm("scontrol", "show", "config"), re.MULTILINE)
        size = int(limit[1]) if limit else _MAX_ARRAY_SIZE
        return cls(store.resolve(), sweep, options, Queue(store.resolve() / "jobs"), max(1, size))

    @property
    def slots(self) -> int:
        """How many chunks may be queued at once."""
        return self.options.max_chunks

    @property
    def width(self) -> int:
        """How many chunks run at once."""
        return self.options.array_parallelism

    def attach(self) -> dict[str, list[str]]:
        """Chunk -> its run ids, of the jobs of this sweep that are still alive."""
        alive = self.alive()
        found = {}
        for array in self._folder.glob("*/chunks.json"):
            for index, run_ids in enumerate(json.loads(array.read_text(encoding="utf-8"))):
                job = f"{array.parent.name}_{index}"
                if job in alive:
                    found[job] = list(run_ids)
        return found

    @property
    def _folder(self) -> Path:
        return self.queue.jobs / self.sweep / "slurm"

    def start(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        """Submits the chunks as arrays; the names of those that Slurm took. It may refuse more while some are
        queued (a limit on jobs); UserError when it refuses although none is."""
        names: list[str] = []
        for first in range(0, len(chunks), self.array_size):
            try:
                names += self._submit(chunks[first : first + self.array_size], label)
            except UserError:
                if not names and not self._alive():
                    raise
                break
        return names

    def _submit(self, chunks: Sequence[Chunk], label: str) -> list[str]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        array = f"{re.sub(r'[^A-Za-z0-9.-]', '-', label)}-{secrets.token_hex(4)}"
        names = [f"{array}_{index}" for index in range(len(chunks))]
        for name, chunk in zip(names, chunks, strict=True):
            chunk.job, chunk.requeued = name, "SLURM_RESTART_COUNT"
        folder = self._folder / array
        folder.mkdir(parents=True)
        (folder / "chunks.json").write_text(json.dumps([chunk.run_ids() for chunk in chunks]), encoding="utf-8")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # sbatch's message is part of ours
                jobs = self._executor(folder).submit_array(chunks)
        except (FailedJobError, FailedSubmissionError) as error:
            shutil.rmtree(folder)
            said = " ".join(str(error).split())[-300:]
            raise UserError(f"cluster=slurm: sbatch refused the job: {said}") from None
        (folder / "arrived").touch()
        self.queue.tasks |= {name: Task(job.job_id, "PENDING") for name, job in zip(names, jobs, strict=True)}
        return names

    def _executor(self, folder: Path) -> Any:
        import submitit

        options = self.options
        package = Path(__file__).resolve().parents[2]
        setup = [
            # From inside the job, so that it is known even if its launcher died while it submitted.
            f"touch {shlex.quote(str(folder / 'arrived'))}",
            f"export PYTHONPATH={shlex.quote(str(package))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS={options.cpus} MKL_NUM_THREADS={options.cpus}",
            *options.setup,
        ]
        executor = submitit.SlurmExecutor(folder, max_num_timeout=options.requeues)
        given: dict[str, Any] = {"partition": options.partition, "account": options.account, "qos": options.qos}
        given |= {"constraint": options.constraint, "gpus_per_node": options.gpus or None}
        executor.update_parameters(
            job_name=folder.name,
            time=options.time_min,
            cpus_per_task=options.cpus,
            srun_args=[f"--cpus-per-task={options.cpus}"],  # since Slurm 22.05 srun does not take it from sbatch
            array_parallelism=options.array_parallelism,
            signal_delay_s=options.signal_s,
            stderr_to_stdout=True,
            setup=setup,
            additional_parameters={"requeue": True},
            **({"mem": f"{round(options.mem_gb * 1024)}MB"} if options.mem_gb else {}),
            **{key: value for key, value in given.items() if value},
        )
        return executor

    def alive(self) -> set[str]:
        """The chunks of this sweep that wait or run; asks the queue."""
        self.queue.look()
        return self._alive()

    def _alive(self) -> set[str]:
        own = {folder.name for folder in self._folder.glob("*")}
        return {job for job in self.queue.tasks if job.rpartition("_")[0] in own and self.queue.is_alive(job)}

    def gone(self, owner: Mapping[str, Any]) -> bool:
        """Whether the owner of a lease or record line is known to be gone, as of the last look."""
        return self.queue.gone(owner)

    def fate(self, owner: Mapping[str, Any]) -> str:
        """What became of it, in words."""
        task = self.queue.tasks.get(str(owner.get("job")))
        if task is None:
            return f"process {owner.get('pid')} on {owner.get('host')} vanished"
        return f"Slurm job {task.id} is gone ({task.state}), process {owner.get('pid')} on {owner.get('host')}"

    def withdrawn(self, job: str) -> bool:
        """Whether a person cancelled the chunk: its runs are not tried again."""
        return job in self.queue.tasks and self.queue.tasks[job].state == "CANCELLED"

    def stop(self) -> None:
        """Cancels the jobs of this sweep and waits until they are gone. UserError when Slurm refuses."""
        cancel(self.queue, self.sweep)


def cancel(queue: Queue, sweep: str) -> int:
    """Cancels every job of the sweep, waits until none is alive, and says how many there were. UserError when
    there may be jobs and Slurm cannot be asked here."""
    own = {folder.name for folder in (queue.jobs / sweep / "slurm").glob("*") if not (folder / "ended").exists()}
    if own:
        check_commands()
    cancelled: set[str] = set()
    for _ in range(_CANCEL_ROUNDS if own else 0):
        queue.look()
        alive = {job for job in queue.tasks if job.rpartition("_")[0] in own and queue.is_alive(job)}
        if not alive:
            break
        if not alive <= cancelled:
            _slurm("scancel", *sorted({queue.tasks[job].id.partition("_")[0] for job in alive}))
        cancelled |= alive
        time.sleep(0.5)
    return len(cancelled)


def described(store: Path, sweep: str) -> str:
    """What the queue holds of the sweep, in one line; empty if nothing, or if Slurm cannot be asked here."""
    queue = Queue(store.resolve() / "jobs")
    queue.look()
    own = {folder.name for folder in (queue.jobs / sweep / "slurm").glob("*")}
    alive = [job for job in queue.tasks if job.rpartition("_")[0] in own and queue.is_alive(job)]
    tasks = [queue.tasks[job] for job in alive]
    states = Counter(f"{t.state.lower()} ({t.reason})" if t.state == "PENDING" else t.state.lower() for t in tasks)
    return "Slurm jobs: " + ", ".join(f"{count} {state}" for state, count in states.most_common()) if states else ""


def check_commands() -> None:
    """UserError when a command of Slurm is missing here."""
    for command in ("sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol"):
        if shutil.which(command) is None:
            raise UserError(f"cluster=slurm: there is no {command} on PATH; use a login node, or cluster=local")


def logs_of(jobs: Path, run_id: str) -> list[Path]:
    """The logs of the jobs that were to make the run, of all sweeps."""
    found = []
    for array in sorted(jobs.glob("*/slurm/*/chunks.json")):
        chunks = json.loads(array.read_text(encoding="utf-8"))
        for index in (i for i, run_ids in enumerate(chunks) if run_id in run_ids):
            pattern = f"*_{index}_0_log.out" if len(chunks) > 1 else "*_0_log.out"
            found += sorted(array.parent.glob(pattern))
    return found


def _slurm(*words: str) -> str:
    """What the command prints. UserError with its message when it fails or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except subprocess.TimeoutExpired:
        raise UserError(f"cluster=slurm: {words[0]} does not answer within {_ANSWER_S} s") from None
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout or "").split())[-300:]
        raise UserError(f"cluster=slurm: {words[0]} failed: {said or error.returncode}") from None
    except OSError as error:
        raise UserError(f"cluster=slurm: {words[0]}: {error.strerror}") from None
    return done.stdout
