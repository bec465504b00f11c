"""A throw-away Slurm on this machine: one munged, one slurmctld and a few slurmd that pose as nodes n1..nN.

Everything lies in one folder and listens on 127.0.0.1; no systemd, cgroups or network. Jobs run as root, and
what they ask for is scheduled but not enforced. Set so that tests are short: a requeued job starts after 6 s
(not 2 min), a dead node is noticed after 30 s and its jobs are requeued about 15 s later.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("slurmd", "slurmstepd", "slurmctld", "munged")

CONF = """\
ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire (5 at least) is also how long a requeued job waits before it may start again
AuthInfo=socket={top}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool/%n
SlurmctldPidFile={top}/run/slurmctld.pid
SlurmdPidFile={top}/run/slurmd-%n.pid
SlurmctldLogFile={top}/log/slurmctld.log
SlurmdLogFile={top}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=86400
MaxArraySize=1001
KillWait=2
CompleteWait=0
EpilogMsgTime=0
SlurmdTimeout=30
JobRequeue=1
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def missing() -> str | None:
    """Why this machine cannot have one, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a Slurm for tests is started as root"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if _where(name) is None]
    return f"not installed: {', '.join(absent)} (Debian: munge slurmctld slurmd slurm-client)" if absent else None


def _where(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


class OneMachine:
    """Start with ``up``, end with ``down``; between them ``SLURM_CONF`` (``conf``) leads every command here."""

    def __init__(self, nodes: int = 2) -> None:
        # The daemons make UNIX sockets, whose path holds 108 characters at most: no deep pytest folder.
        self.top = Path(tempfile.mkdtemp(prefix="slurm-test-", dir="/tmp"))
        self.top.chmod(0o755)
        self.conf = self.top / "etc" / "slurm.conf"
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.env = os.environ | {"SLURM_CONF": str(self.conf)}

    def up(self, seconds: float = 60) -> None:
        """Starts the daemons and waits until all nodes are idle. RuntimeError with the logs' end if they are not."""
        for name in ("etc", "log", "run", "state", "spool", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.top / name).mkdir(mode=0o755)
        port = _free_ports(len(self.nodes) + 1)
        host = socket.gethostname().split(".")[0]
        ports = {"port": port, "first": port + 1, "last": port + len(self.nodes)}
        self.conf.write_text(CONF.format(host=host, top=self.top, nodes=len(self.nodes), **ports))
        (self.conf.parent / "cgroup.conf").write_text(self._cgroups())
        key = self.top / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": "munge/socket", "pid-file": "run/munged.pid", "seed-file": "munge/seed"}
        words = [f"--{name}={self.top / value}" for name, value in files.items()]
        self._start("munged", "--force", f"--log-file={self.top}/log/munged.log", *words)
        self._start("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: self.states().count("idle") == len(self.nodes), "idle nodes", seconds)

    def _cgroups(self) -> str:
        """slurmd loads a cgroup plug-in even when nothing uses it: none since 23.02, before that an empty one."""
        version = subprocess.run([str(_where("slurmd")), "-V"], capture_output=True, text=True).stdout
        found = re.search(r"(\d+)\.(\d+)", version)
        if found and (int(found[1]), int(found[2])) >= (23, 2):
            return "CgroupPlugin=disabled\n"
        return f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.top}/no-cgroups\nCgroupAutomount=no\n"

    def _start(self, name: str, *words: str) -> None:
        with open(self.top / "log" / f"{name}.out", "ab") as log:
            code = subprocess.call(
                [str(_where(name)), *words], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if code:
            raise RuntimeError(f"{name} did not start:\n{self.logs()}")

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """The node loses its power: its daemon, its job steps and everything in its jobs are gone at once."""
        jobs = self("squeue", "-h", "-t", "R,CG", "-w", node, "-o", "%A").split()
        steps = tuple(f"slurmstepd: [{job}." for job in jobs)
        os.kill(int((self.top / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        for _ in range(3):  # a step may be starting a process
            for process in self._processes():
                if process.environ.get("SLURMD_NODENAME") == node or process.words[0].startswith(steps):
                    process.kill()

    def states(self) -> list[str]:
        return self("sinfo", "-h", "-N", "-o", "%T").split()

    def __call__(self, *words: str) -> str:
        """What a command of Slurm prints; empty if it fails."""
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=30).stdout

    def wait(self, done: Callable[[], bool], what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(f"no {what} after {seconds:g} s\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        parts = []
        for file in sorted((self.top / "log").iterdir()):
            parts += [f"--- {file.name}", *file.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(parts)

    def down(self) -> None:
        """Cancels all jobs, ends the daemons and removes the folder."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self("scancel", "--user=root")
            for _ in range(50):
                if not self("squeue", "-h", "-t", "R,CG,S").strip():
                    break
                time.sleep(0.1)
        for name in DAEMONS:
            for signum, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
                end = time.monotonic() + seconds
                for process in self._processes(name):
                    process.kill(signum)
                while self._processes(name) and time.monotonic() < end:
                    time.sleep(0.1)
        for process in self._processes():  # what is left of jobs
            if "SLURM_JOB_ID" in process.environ:
                process.kill()
        shutil.rmtree(self.top, ignore_errors=True)

    def _processes(self, name: str | None = None) -> list[_Process]:
        """This instance's processes: those with its SLURM_CONF in their environment or on their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            process = _Process.of(folder)
            if process and (name is None or process.name == name) and process.belongs_to(self):
                found.append(process)
        return found


class _Process:
    def __init__(self, pid: int, name: str, environ: dict[str, str], words: list[str]) -> None:
        self.pid, self.name, self.environ, self.words = pid, name, environ, words

    @classmethod
    def of(cls, folder: Path) -> _Process | None:
        try:
            if "\nState:\tZ" in (folder / "status").read_text():
                return None
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            name = (folder / "comm").read_text().strip()
        except OSError:  # it has ended, or is somebody else's
            return None
        environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return cls(int(folder.name), name, environ, words)

    def belongs_to(self, slurm: OneMachine) -> bool:
        conf = str(slurm.conf)
        if self.pid == os.getpid():
            return False
        mine = self.environ.get("SLURM_CONF") == conf or conf in self.words
        return mine or (self.name == "munged" and any(str(slurm.top) in word for word in self.words))

    def kill(self, signum: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)


def _free_ports(count: int) -> int:
    """The first of a block of ports that nobody listens on; every pytest worker looks in a range of its own."""
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    for first in range(16800 + 1000 * worker, 16800 + 1000 * (worker + 1), 20):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports for a Slurm")
