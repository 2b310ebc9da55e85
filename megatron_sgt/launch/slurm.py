"""Ranks under Slurm's srun, from its SLURM_* variables alone: no scontrol, no ssh.

The variables and the syntax of node lists and task counts are those of the srun manual page
(https://slurm.schedmd.com/srun.html).
"""

import re
from collections.abc import Iterator, Mapping

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, read_int, require_int
from megatron_sgt.lease.scheduler import SPECIAL_STEPS

PORTS = range(20000, 32000)
"""Default ports: below Linux's ephemeral ports (from 32768), above most services'."""
PORT_STRIDE = 37
"""Distance between the ports of consecutive jobs, so that their first steps differ; coprime to len(PORTS)."""


def inside_srun_step(environ: Mapping[str, str]) -> bool:
    """Say whether this process is a task of srun, not just a shell or script inside a Slurm allocation."""
    step = read_int(environ, "SLURM_STEP_ID")
    return step is not None and step < SPECIAL_STEPS and "SLURM_PROCID" in environ


def discover_slurm(environ: Mapping[str, str]) -> RankInfo:
    """Return this task's place in its srun step.

    Rank 0 listens on the first node of the step, or on the loopback if there is only one node; MASTER_ADDR and
    MASTER_PORT, if set, take precedence.

    Raises:
        ConfigError: variables are missing or disagree.
    """
    world_size = require_int(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise ConfigError("inside an srun step, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set")
    nodes = parse_nodelist(nodelist)
    address = environ.get("MASTER_ADDR") or (nodes[0] if len(nodes) > 1 else LOOPBACK)
    if len(nodes) > 1 and (address == "localhost" or address.startswith("127.")):
        raise ConfigError(f"MASTER_ADDR is {address}, but the step runs on {len(nodes)} nodes ({nodelist}); unset it")
    return RankInfo(
        rank=require_int(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=require_int(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_this_node(environ, world_size, len(nodes)),
        master_addr=address,
        master_port=read_int(environ, "MASTER_PORT") or step_port(environ),
        launcher="slurm",
    )


def job_end(environ: Mapping[str, str]) -> int | None:
    """Return when Slurm will end this job, in seconds since the epoch; None outside a job, or before 22.05."""
    return read_int(environ, "SLURM_JOB_END_TIME")


def step_port(environ: Mapping[str, str]) -> int:
    """Return the port of this step: 20000 + (37 x job id + step id) mod 12000, so that neighbouring steps differ."""
    job, step = require_int(environ, "SLURM_JOB_ID", "SLURM_JOBID"), require_int(environ, "SLURM_STEP_ID")
    return PORTS[(PORT_STRIDE * job + step) % len(PORTS)]


def parse_tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node: "2(x3),1" is [2, 2, 2, 1].

    Raises:
        ConfigError: the text cannot be read.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"cannot read the tasks per node '{text}'; Slurm writes them like '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def parse_nodelist(text: str) -> list[str]:
    """Return the node names of a Slurm node list, in its order.

    "gpu[08-10,12]-ib,login" is gpu08-ib, gpu09-ib, gpu10-ib, gpu12-ib, login. Several brackets in one name
    multiply, the last one fastest; brackets may be nested.

    Raises:
        ConfigError: the text cannot be read.
    """
    try:
        return [name for part in _split(text.strip()) for name in _expand(part)]
    except ValueError as error:
        raise ConfigError(f"cannot read the node list '{text}': {error}") from None


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += {"[": 1, "]": -1}.get(char, 0)
        if depth < 0:
            raise ValueError("a bracket is closed but not opened")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if depth:
        raise ValueError("a bracket is not closed")
    if not all(parts):
        raise ValueError("an entry is empty")
    return parts


def _expand(part: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    end, depth = 0, 1
    while depth:
        depth += {"[": 1, "]": -1}.get(rest[end], 0)
        end += 1
    inside, tail = rest[: end - 1], rest[end:]
    for item in _split(inside):
        for middle in _expand_item(item):
            for suffix in _expand(tail):
                yield head + middle + suffix


def _expand_item(item: str) -> Iterator[str]:
    bounds = re.fullmatch(r"(\d+)-(\d+)", item)
    if bounds is None:
        yield from _expand(item)
        return
    first, last = int(bounds[1]), int(bounds[2])
    if last < first:
        raise ValueError(f"the range {item} runs backwards")
    for number in range(first, last + 1):
        yield str(number).zfill(len(bounds[1]))


def _tasks_on_this_node(environ: Mapping[str, str], world_size: int, num_nodes: int) -> int:
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if text:
        counts = parse_tasks_per_node(text)
    elif world_size % num_nodes == 0:
        counts = [world_size // num_nodes] * num_nodes
    else:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE is not set, and {num_nodes} nodes cannot share {world_size} tasks"
        )
    if sum(counts) != world_size or len(counts) != num_nodes:
        raise ConfigError(
            f"Slurm's variables disagree: {world_size} tasks on {num_nodes} nodes, tasks per node '{text}'"
        )
    node = read_int(environ, "SLURM_NODEID")
    if node is None and len(set(counts)) == 1:
        node = 0
    if node is None or not 0 <= node < num_nodes:
        raise ConfigError(f"SLURM_NODEID is {node}, must be 0..{num_nodes - 1}")
    return counts[node]
