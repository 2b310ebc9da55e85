"""The environment of every process of a job, in one place: what is set, to what, and why."""

from megatron_sgt.config import Config

# torch's recorder of collectives: this many per rank, written to a file when a collective times out.
_RECORDED_COLLECTIVES = 2000


def job_environment(config: Config, gpus: bool) -> dict[str, str]:
    """Variables of a run on GPUs or on CPUs, in the order in which a job script sets them.

    The values are shell words: ``$SLURM_...`` is filled in where the job runs.
    """
    common = {
        "OMP_NUM_THREADS": str(config.train.threads_per_rank or "$SLURM_CPUS_PER_TASK"),
        "TOKENIZERS_PARALLELISM": "false",  # their threads and forked data workers do not go together
        "PYTHONUNBUFFERED": "1",  # a rank that is killed leaves its last lines in its log
    }
    if not gpus:
        return common
    return common | {
        **_hardware_queues(config),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # growth changes the sizes of activations
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails or times out ends the process
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(_RECORDED_COLLECTIVES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def _hardware_queues(config: Config) -> dict[str, str]:
    """One hardware queue keeps Megatron's tensor-parallel overlap in order on GPUs before Blackwell.

    ZeRO-3 gathers weights beside the computation, which one queue would serialize.
    """
    one = config.parallel.tensor_model_parallel_size > 1 and config.parallel.zero_stage < 3
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if one else {}
