"""The small parts that every launcher's discovery is made of."""

import socket

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import RankInfo, free_port, read_int, require_int, to_environ


def test_to_environ() -> None:
    assert to_environ(RankInfo(5, 8, 1, 4, "node1", 29500, "slurm")) == {
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
    }


@pytest.mark.parametrize(
    ("numbers", "port"),
    [
        ((8, 8, 0, 1), 1),
        ((-1, 8, 0, 1), 1),
        ((0, 8, 1, 1), 1),
        ((0, 1, 0, 2), 1),
        ((0, 1, 0, 1), 0),
        ((0, 1, 0, 1), 65536),
    ],
)
def test_numbers_that_disagree(numbers: tuple[int, int, int, int], port: int) -> None:
    with pytest.raises(ConfigError, match="mpi: "):
        RankInfo(*numbers, "node1", port, "mpi")


def test_read_int_takes_the_first_that_is_set() -> None:
    environ = {"A": "", "B": "2", "C": "3"}
    assert read_int(environ, "Z", "A", "B", "C") == 2
    assert read_int(environ, "Z", "A") is None
    with pytest.raises(ConfigError, match="B must be an integer, got 'two'"):
        read_int({"B": "two"}, "B")
    with pytest.raises(ConfigError, match="Z or A is not set"):
        require_int(environ, "Z", "A")


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
