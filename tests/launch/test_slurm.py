"""Slurm's node lists and task counts, and the step of srun they describe."""

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.slurm import (
    PORTS,
    discover_slurm,
    inside_srun_step,
    job_end,
    parse_nodelist,
    parse_tasks_per_node,
    step_port,
)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("gpu[9-10]", ["gpu9", "gpu10"]),
        ("gpu[1,3-4,07]", ["gpu1", "gpu3", "gpu4", "gpu07"]),
        ("gpu[1-2]-ib", ["gpu1-ib", "gpu2-ib"]),
        ("gpu[1-2].local,login", ["gpu1.local", "gpu2.local", "login"]),
        ("rack[0-1]node[2-3]", ["rack0node2", "rack0node3", "rack1node2", "rack1node3"]),
        ("r[0-1]n[05,7]x,b[3-3]", ["r0n05x", "r0n7x", "r1n05x", "r1n7x", "b3"]),
        ("[1-2]", ["1", "2"]),
        ("x[1,2n[0-1]]", ["x1", "x2n0", "x2n1"]),
        ("n-1-[1-2]", ["n-1-1", "n-1-2"]),
        (" gpu1 ", ["gpu1"]),
    ],
)
def test_nodelist(text: str, nodes: list[str]) -> None:
    assert parse_nodelist(text) == nodes


@pytest.mark.parametrize("text", ["", "a,", "a[1-2", "a1-2]", "a]1[", "a[]", "a[1,]", "a[3-2]", "a,,b"])
def test_unreadable_nodelist(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the node list"):
        parse_nodelist(text)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8]), ("2, 1", [2, 1])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert parse_tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2(3)", "2,", "-1"])
def test_unreadable_tasks_per_node(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the tasks per node"):
        parse_tasks_per_node(text)


STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_NODELIST": "cn[1-9]",
    "SLURM_STEP_NODELIST": "cn[4-7]",
    "SLURM_NTASKS": "7",
    "SLURM_TASKS_PER_NODE": "9(x9)",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (6, 7, 0, 1, "cn4", 20000 + 37 * 77 + 2)),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, (3, 7, 1, 2, "cn4", 22851)),
        ({"MASTER_PORT": "1234"}, (6, 7, 0, 1, "cn4", 1234)),
        ({"MASTER_ADDR": "cn4-ib"}, (6, 7, 0, 1, "cn4-ib", 22851)),
        # The step may have fewer tasks than the job asked for.
        ({"SLURM_NTASKS": "81", "SLURM_STEP_NUM_TASKS": "7"}, (6, 7, 0, 1, "cn4", 22851)),
        # One node: rank 0 is met on the loopback, whatever the node's name resolves to.
        (
            {
                "SLURM_STEP_NODELIST": "cn5",
                "SLURM_STEP_TASKS_PER_NODE": "7",
                "SLURM_NODEID": "0",
                "SLURM_LOCALID": "6",
            },
            (6, 7, 6, 7, "127.0.0.1", 22851),
        ),
    ],
)
def test_step(changes: dict[str, str], expected: tuple[object, ...]) -> None:
    info = discover_slurm({**STEP, **changes})
    place = (
        info.rank,
        info.world_size,
        info.local_rank,
        info.local_world_size,
        info.master_addr,
        info.master_port,
    )
    assert place == expected
    assert info.launcher == "slurm"


def test_step_without_its_own_lists_uses_the_jobs() -> None:
    environ = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "cn[1-2]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
    }
    info = discover_slurm(environ)
    assert (info.master_addr, info.local_world_size) == ("cn1", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""},
            "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST",
        ),
        ({"SLURM_STEP_NODELIST": "cn[4-"}, "cannot read the node list"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, "7 tasks on 4 nodes, tasks per node '2\\(x2\\),1'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": ""}, "4 nodes cannot share 7 tasks"),
        ({"SLURM_NODEID": "4"}, "SLURM_NODEID is 4, must be 0..3"),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID is None"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        ({"SLURM_LOCALID": "1"}, "local rank 1 of 1"),
        ({"SLURM_PROCID": "7"}, "slurm: rank 7 of 7"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID or SLURM_JOBID is not set"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS must be an integer, got 'many'"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR is localhost, but the step runs on 4 nodes"),
    ],
)
def test_impossible_step(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        discover_slurm({**STEP, **changes})


def test_ports_of_neighbours_differ_and_stay_in_range() -> None:
    def port(job: int, step: int) -> int:
        return step_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})

    neighbours = [port(job, step) for job in range(1000, 1300) for step in range(30)]
    assert len(set(neighbours)) == len(neighbours)
    assert all(value in PORTS for value in (port(0, 0), port(10**9, 4000), *neighbours))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_ID": "0"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967294"}, False),
    ],
)
def test_inside_srun_step(environ: dict[str, str], expected: bool) -> None:
    assert inside_srun_step(environ) is expected


def test_the_end_of_the_job() -> None:
    assert job_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1_700_000_000
    assert job_end({}) is None
