"""A whole Slurm on this machine: munged, slurmctld and two slurmd "nodes", on the loopback, in one folder.

It needs the programs (Debian: slurm-wlm, munge) but none of the machine's Slurm or munge configuration, and it
leaves nothing behind: every process of it carries the folder in its environment or command line, and is killed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers.commands import without_launcher

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, f"{HOST}-b")
"""Their order is Slurm's. Rank 0 is met on the first, by its name, which is this machine's."""
GRACE = 20
"""Seconds that a preempted job of the partition `main` is given."""

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as its credential is valid: 120 s, unless told otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=8
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
OverTimeLimit=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=ALL Default=YES State=UP GraceTime={grace}
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class SlurmCluster:
    """Two nodes and a controller, from ``start`` to ``stop``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **without_launcher(),
            "PATH": PATH,
            "SLURM_CONF": str(self.conf),
        }

    def start(self) -> None:
        """Start everything; returns when both nodes are idle."""
        self.folder.chmod(0o755)  # munged wants its socket within everyone's reach
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        values = {"folder": self.folder, "host": HOST, "nodes": NODES, "user": getpass.getuser()}
        self.conf.write_text(CONF.format(ports=_free_ports(3), grace=GRACE, **values))
        own = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", f"--socket={self.folder}/munge.socket", *own)
        until(lambda: (self.folder / "munge.socket").exists(), "munged", 10)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd of ``node`` and wait until Slurm can use it."""
        self._daemon("slurmd", "-D", "-N", node)
        until(lambda: self._try("sinfo", "-h", "-n", node, "-o", "%T").startswith(("idle", "mix")), node, 30)

    def kill_node(self, node: str) -> None:
        """What a power failure does: every process of the node is gone, and no process is told.

        Slurm finds out by itself within half a minute. Here it hears it at once, as from a monitor of the machines,
        and does with the job what it would have done then.
        """
        for pid, environ, command in _processes():
            if f"SLURMD_NODENAME={node}\0" in environ and str(self.conf) in environ:
                for victim in [*_daemons_above(pid), pid]:
                    _kill(victim)
            elif command.startswith("slurmd\0") and command.endswith(f"-N\0{node}\0") and str(self.conf) in environ:
                _kill(pid)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power failure")

    def tasks(self, number: str) -> list[int]:
        """The ranks of a job: Python, without the srun and the bash around it, and without data workers."""
        pids = [
            pid
            for pid, environ, command in _processes()
            if f"SLURM_JOB_ID={number}\0" in environ and command.split("\0")[1:3] == ["-m", "megatron_sgt"]
        ]
        return [pid for pid in pids if _parent(pid) not in pids]

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Reason, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, state: str, seconds: float) -> dict[str, str]:
        """Wait until the job is in ``state``."""
        until(lambda: self.job(number)["JobState"] == state, f"job {number} {state}", seconds, self.describe)
        return self.job(number)

    def describe(self) -> str:
        """What a person needs to see when a test fails."""
        return "\n".join([self._try("squeue"), (self.folder / "slurmctld.log").read_text()[-3000:]])

    def stop(self) -> None:
        """End every process of this Slurm, its jobs included."""
        for _ in range(50):
            mine = [pid for pid, environ, command in _processes() if str(self.folder) in environ + command]
            mine = [pid for pid in mine if pid != os.getpid()]
            if not mine:
                return
            for pid in mine:
                _kill(pid)
            for daemon in self.daemons:
                daemon.poll()
            time.sleep(0.1)
        raise AssertionError(f"processes that cannot be killed: {mine}")

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _try(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()


def until(condition: Callable[[], bool], what: str, seconds: float, describe: Callable[[], str] = lambda: "") -> None:
    """Wait for ``condition``; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{describe()}"
        time.sleep(0.2)  # many conditions start a program of Slurm


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _processes() -> Iterator[tuple[int, str, str]]:
    """(pid, environment, command line) of every process that we may look into; entries end with a zero byte."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "environ").read_text(), (entry / "cmdline").read_text()
            except (OSError, UnicodeDecodeError):
                continue


def _daemons_above(pid: int) -> list[int]:
    """The slurmstepd that a task descends from."""
    found = []
    while pid > 1:
        if _status(pid, "Name") == "slurmstepd":
            found.append(pid)
        pid = _parent(pid)
    return found


def _parent(pid: int) -> int:
    return int(_status(pid, "PPid") or 0)


def _status(pid: int, field: str) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{field}:"))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
