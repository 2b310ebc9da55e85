"""Discovery under mpirun, with a stand-in for mpi4py, and with the real one where there is one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.environment import discover
from megatron_sgt.launch.mpi import started_by_mpi
from megatron_sgt.launch.rank_info import to_environ
from tests.helpers.commands import MPI_ENVIRONMENT, no_mpi

ROOT = Path(__file__).parents[2]
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}


class FakeComm:
    """A communicator as one rank sees it; a broadcast of another rank's value is scripted."""

    def __init__(self, rank: int, size: int, hosts: list[str], sent: Any = None) -> None:
        self.rank, self.size, self.hosts, self.sent = rank, size, hosts, sent

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def Split_type(self, kind: str, key: int) -> "FakeComm":
        assert (kind, key) == ("shared", self.rank)
        mates = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]
        return FakeComm(mates.index(self.rank), len(mates), [])

    def Free(self) -> None:
        pass

    def bcast(self, value: Any, root: int) -> Any:
        assert root == 0
        assert (value is None) == (self.rank != 0)
        return value if self.rank == 0 else self.sent


def install(monkeypatch: pytest.MonkeyPatch, comm: FakeComm) -> None:
    package, mpi = ModuleType("mpi4py"), ModuleType("mpi4py.MPI")
    vars(mpi).update(COMM_WORLD=comm, COMM_TYPE_SHARED="shared")
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)


@pytest.mark.parametrize("environ", [HYDRA, {"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_RANK": "1", "PMI_SIZE": "4"}])
def test_rank_of_several_hosts(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    install(monkeypatch, FakeComm(3, 4, ["a", "a", "b", "b"], sent=("a", 4711)))
    info = discover(environ)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (3, 4, 1, 2)
    assert (info.master_addr, info.master_port, info.launcher) == ("a", 4711, "mpi")


@pytest.mark.parametrize(
    ("hosts", "environ", "address"),
    [
        (["a", "a"], {}, "127.0.0.1"),
        (["a", "b"], {}, socket.gethostname()),
        (["a", "b"], {"MASTER_ADDR": "a-ib"}, "a-ib"),
    ],
)
def test_rank_0_names_the_meeting_point(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], environ: dict[str, str], address: str
) -> None:
    install(monkeypatch, FakeComm(0, 2, hosts))
    info = discover({**HYDRA, **environ})
    assert info.master_addr == address
    assert 0 < info.master_port < 65536
    assert discover({**HYDRA, **environ, "MASTER_PORT": "99"}).master_port == 99


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(ConfigError, match=r"pip install megatron-sgt\[mpi\]"):
        discover(HYDRA)


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        (HYDRA, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, True),
        (SRUN, False),
        ({**SRUN, "PMI_SIZE": "4", "PMI_RANK": "1"}, False),
        # mpirun that uses srun to reach the nodes: the step holds its helpers, not its ranks.
        ({**SRUN, "PMI_SIZE": "32", "PMI_RANK": "9"}, True),
        ({**SRUN, **HYDRA}, True),
    ],
)
def test_started_by_mpi(environ: dict[str, str], expected: bool) -> None:
    assert started_by_mpi(environ) is expected


@pytest.mark.mpi
@pytest.mark.skipif(no_mpi(), reason="needs mpirun (Debian: openmpi-bin) and mpi4py")
def test_real_mpiexec(tmp_path: Path) -> None:
    # Files, because mpiexec may glue the output of two ranks into one line.
    code = (
        "import json, pathlib, sys, megatron_sgt.launch as launch\n"
        "info = launch.discover()\n"
        "pathlib.Path(sys.argv[1], f'{info.rank}.json').write_text(json.dumps(vars(info)))"
    )
    command = ["mpiexec", "-n", "2", sys.executable, "-c", code, str(tmp_path)]
    # Tests that ran in this process before may have left a place of its own in the environment.
    place = to_environ(discover({}))
    environment = {name: value for name, value in os.environ.items() if name not in place}
    subprocess.run(command, check=True, timeout=120, cwd=ROOT, env={**environment, **MPI_ENVIRONMENT})
    infos = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert [(i["rank"], i["local_rank"], i["world_size"], i["local_world_size"]) for i in infos] == [
        (0, 0, 2, 2),
        (1, 1, 2, 2),
    ]
    assert {i["master_addr"] for i in infos} == {"127.0.0.1"}
    assert len({i["master_port"] for i in infos}) == 1
