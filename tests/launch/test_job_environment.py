import pytest

from megatron_sgt.launch.job_environment import job_environment
from tests.helpers.single import small_config


def test_cpus_get_no_variable_of_gpus() -> None:
    assert set(job_environment(small_config(), False)) == {
        "OMP_NUM_THREADS",
        "TOKENIZERS_PARALLELISM",
        "PYTHONUNBUFFERED",
    }


@pytest.mark.parametrize(
    ("tensor_parallel", "zero_stage", "value"), [(1, 1, None), (2, 1, "1"), (2, 2, "1"), (2, 3, None)]
)
def test_one_hardware_queue_for_tensor_parallelism_only(
    tensor_parallel: int, zero_stage: int, value: str | None
) -> None:
    config = small_config(parallel={"tensor_model_parallel_size": tensor_parallel, "zero_stage": zero_stage})
    assert job_environment(config, True).get("CUDA_DEVICE_MAX_CONNECTIONS") == value


def test_threads_are_those_of_the_configuration_or_of_the_task() -> None:
    for threads, words in ((None, "$SLURM_CPUS_PER_TASK"), (3, "3")):
        config = small_config(train={"threads_per_rank": threads})
        assert job_environment(config, True)["OMP_NUM_THREADS"] == words
