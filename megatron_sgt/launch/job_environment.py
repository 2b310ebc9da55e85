"""The environment of every process of a run: one table of what is set, to what, and why. Never imports torch.

A rank sets most of it for itself at its start, under any launcher, before CUDA and the compilers read it
(``set_environment``). What must exist before Python starts is in the job script (``script_environment``). The user's
own settings win; a variable that the user has set to an empty value is not set at all.
"""

import ctypes
import os
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sgt.config import Config
from megatron_sgt.launch.rank_info import RankInfo, read_int

MOST_COMPILERS = 4
"""Compiler processes of one rank. torch starts up to 32 of them: 256 on a host of eight ranks."""
RECORDED_COLLECTIVES = 2000
BLACKWELL = 10
"""Major compute capability of the first GPUs on which Megatron-Core no longer asks for one hardware queue."""


@dataclass(frozen=True)
class Process:
    """What the values depend on."""

    config: Config
    gpus: bool
    cores: int = 1
    """Processor cores that this rank may count as its own."""
    generation: int | None = None
    """Major compute capability of the GPUs; None where it is not known."""
    temporary: str = "/tmp"


@dataclass(frozen=True)
class Variable:
    """One row of the table. ``value`` returns None where the variable is not to be set."""

    name: str
    value: Callable[[Process], str | None]
    shown: str
    """The value as the documentation puts it."""
    reason: str
    gpus_only: bool = True
    in_script: bool = False
    """Read before the first line of Python, so that a process cannot set it for itself."""
    other_names: tuple[str, ...] = ()
    """Older or newer names of the setting. All get the value; one that the user has set decides for all."""
    is_folder: bool = False


def compiler_processes(cores: int) -> int:
    """Compiler processes of a rank that has ``cores`` cores."""
    return max(1, min(MOST_COMPILERS, cores))


def needs_one_queue(config: Config, generation: int | None) -> bool:
    """Whether Megatron's tensor-parallel layers need a single hardware queue to overlap as intended.

    They order a collective before a product by the order of their launches. ZeRO-3 gathers weights beside the
    computation, which one queue would put behind it. An unknown generation counts as one before Blackwell.
    """
    old = generation is None or generation < BLACKWELL
    return old and config.parallel.tensor_model_parallel_size > 1 and config.parallel.zero_stage < 3


def _fixed(value: str) -> Callable[[Process], str | None]:
    return lambda process: value


def _cache(name: str) -> Callable[[Process], str | None]:
    return lambda process: str(Path(process.temporary, f"megatron_sgt-{os.getuid()}", name))


VARIABLES = (
    Variable(
        "OMP_NUM_THREADS",
        lambda p: str(p.config.train.threads_per_rank or "$SLURM_CPUS_PER_TASK"),
        "`train.threads_per_rank`, else the cores of the task",
        "otherwise every rank starts a thread per core of the node",
        gpus_only=False,
        in_script=True,
    ),
    Variable(
        "PYTHONUNBUFFERED",
        _fixed("1"),
        "1",
        "a rank that is killed leaves its last lines in its log",
        gpus_only=False,
        in_script=True,
    ),
    Variable(
        "TOKENIZERS_PARALLELISM",
        _fixed("false"),
        "false",
        "threads of tokenizers are not compatible with forked data workers",
        gpus_only=False,
    ),
    Variable(
        "TORCHINDUCTOR_COMPILE_THREADS",
        lambda p: str(compiler_processes(p.cores)),
        f"cores per rank, at most {MOST_COMPILERS}",
        "torch starts up to 32 compilers per rank, and eight ranks of them exhaust a host's memory",
        gpus_only=False,
    ),
    Variable(
        "PYTORCH_ALLOC_CONF",
        _fixed("expandable_segments:True"),
        "expandable_segments:True",
        "growth changes the sizes of activations, which fragments segments of fixed size",
        other_names=("PYTORCH_CUDA_ALLOC_CONF",),  # older torch knows it alone, 2.13 reads it first
    ),
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        lambda p: "1" if needs_one_queue(p.config, p.generation) else None,
        "1 with tensor parallelism below ZeRO-3, on GPUs before Blackwell; else not set",
        "one hardware queue keeps Megatron's overlap of collectives and products in order; ZeRO-3 wants several",
    ),
    Variable(
        "TRITON_CACHE_DIR",
        _cache("triton"),
        "`TMPDIR`/megatron_sgt-UID/triton",
        "compiled kernels on the node's own disk; Triton's own choice, the home directory, is often a shared one",
        is_folder=True,
    ),
    Variable(
        "TORCHINDUCTOR_CACHE_DIR",
        _cache("inductor"),
        "`TMPDIR`/megatron_sgt-UID/inductor",
        "beside them, in a folder that is checked to belong to the user",
        is_folder=True,
    ),
    Variable("NCCL_DEBUG", _fixed("WARN"), "WARN", "NCCL's warnings go to the rank's log"),
    Variable(
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        _fixed(str(RECORDED_COLLECTIVES)),
        str(RECORDED_COLLECTIVES),
        "collectives that NCCL's flight recorder keeps per rank; older torch keeps none by itself",
        other_names=("TORCH_FR_BUFFER_SIZE",),
    ),
    Variable(
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        _fixed("1"),
        "1",
        "writes them to a file when a collective times out",
    ),
)


def script_environment(config: Config, gpus: bool, given: dict[str, str] | None = None) -> dict[str, str]:
    """Variables that a job script exports, in their order; values are shell words, filled in where the job runs.

    Args:
        given: the user's own, over the table's. An empty value leaves a variable out, of the process too.
    """
    process = Process(config, gpus)
    own = {v.name: v.value(process) or "" for v in VARIABLES if v.in_script and (gpus or not v.gpus_only)}
    for_ranks = {name for v in VARIABLES if not v.in_script for name in (v.name, *v.other_names)}
    wanted = own | (given or {})
    return {name: value for name, value in wanted.items() if value or name in for_ranks}


def set_environment(
    config: Config, info: RankInfo, gpus: bool, environ: MutableMapping[str, str] | None = None
) -> None:
    """Set this rank's variables in ``environ`` (default: os.environ), before torch starts CUDA or a compiler."""
    environ = os.environ if environ is None else environ
    one_queue = gpus and needs_one_queue(config, None)  # else the generation does not matter
    process = Process(
        config, gpus, cores_of(info, environ), gpu_generation() if one_queue else None, tempfile.gettempdir()
    )
    for variable in VARIABLES:
        names = (variable.name, *variable.other_names)
        if variable.in_script or (variable.gpus_only and not gpus):
            continue
        given = [name for name in names if name in environ]
        for name in given:
            if not environ[name]:
                del environ[name]
        value = None if given else variable.value(process)
        if value is None or (variable.is_folder and not private_folder(Path(value))):
            continue
        for name in names:
            environ[name] = value


def cores_of(info: RankInfo, environ: MutableMapping[str, str]) -> int:
    """Cores that a rank may count as its own: those of its Slurm task, else its share of those it may run on."""
    own = read_int(environ, "SLURM_CPUS_PER_TASK") if info.launcher == "slurm" else None
    return own or max(1, len(os.sched_getaffinity(0)) // info.local_world_size)


def private_folder(folder: Path) -> bool:
    """Make ``folder`` and the one above for this user alone; False if another user owns them, or they cannot be made.

    Code is loaded from here, and everybody may write into the temporary folder.
    """
    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
            about = path.lstat()
            if about.st_uid != os.getuid() or about.st_mode & 0o022 or path.is_symlink():
                return False
    except OSError:
        return False
    return True


def gpu_generation() -> int | None:
    """Major compute capability of the first GPU, None if NVIDIA's management library does not say.

    Asking torch would start CUDA, after which the environment has no effect.
    """
    major, minor, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2():
            return None
        failed = library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        failed = failed or library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return None if failed else major.value
