"""The translation to DeepSpeed's dictionary, value by value."""

import copy
from typing import Any

import pytest

from megatron_sgt.engine.deepspeed_config import check_deepspeed, deepspeed_config
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.layer import SGTLayer
from tests.helpers.single import small_config


def translated(world_size: int = 1, precision: str = "fp32", **sections: dict[str, Any]) -> dict[str, Any]:
    return deepspeed_config(small_config(**sections), world_size, precision)


@pytest.mark.parametrize(
    ("train", "tensor_parallel", "world_size", "accumulation"),
    [((2, 2), 1, 1, 1), ((2, 16), 1, 1, 8), ((2, 16), 1, 4, 2), ((2, 16), 2, 4, 4), ((1, 64), 4, 8, 32)],
)
def test_batch_sizes_multiply(train: tuple[int, int], tensor_parallel: int, world_size: int, accumulation: int) -> None:
    micro, total = train
    found = translated(
        world_size,
        train={"micro_batch_size": micro, "global_batch_size": total},
        parallel={"tensor_model_parallel_size": tensor_parallel},
    )
    assert found["train_batch_size"] == total
    assert found["train_micro_batch_size_per_gpu"] == micro
    assert found["gradient_accumulation_steps"] == accumulation
    # DeepSpeed's own rule, over the data-parallel ranks.
    assert total == micro * accumulation * world_size // tensor_parallel


def test_batch_sizes_that_do_not_multiply() -> None:
    with pytest.raises(ConfigError, match="batch sizes do not multiply"):
        translated(3, train={"micro_batch_size": 2, "global_batch_size": 8})


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16"), [("fp32", False, False), ("bf16", True, False), ("fp16", False, True)]
)
def test_precision(precision: str, bf16: bool, fp16: bool) -> None:
    found = translated(precision=precision)
    assert (found["bf16"]["enabled"], found["fp16"]) == (bf16, {"enabled": fp16})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("summed", ["fp32", "model"])
@pytest.mark.parametrize("reduced", ["fp32", "model"])
def test_types_of_gradients(precision: str, summed: str, reduced: str) -> None:
    found = translated(
        precision=precision,
        optim={"grad_accum_dtype": summed, "grad_reduce_dtype": reduced},
        parallel={"zero_stage": 2},
    )
    names = {"fp32": "fp32", "model": precision}
    assert found["data_types"] == {"grad_accum_dtype": names[summed]}
    assert found["communication_data_type"] == names[reduced]
    widened = precision != "fp32" and reduced == "fp32"
    assert found["zero_optimization"].get("reduce_scatter", True) is not widened
    assert found["bf16"]["immediate_grad_update"] is True


def test_reduce_scatter_can_be_had_back() -> None:
    raw = {"zero_optimization": {"reduce_scatter": True}}
    found = translated(precision="bf16", parallel={"zero_stage": 2}, deepspeed=raw)
    assert found["zero_optimization"]["reduce_scatter"] is True


@pytest.mark.parametrize(("stage", "clipping"), [(0, 0.0), (1, 0.7), (2, 0.7), (3, 0.7)])
def test_stage_0_is_clipped_by_the_step(stage: int, clipping: float) -> None:
    found = translated(2, train={"global_batch_size": 4}, parallel={"zero_stage": stage}, optim={"clip_grad": 0.7})
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_clipping"] == clipping


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_3_takes_whole_layers(stage: int) -> None:
    found = translated(2, train={"global_batch_size": 4}, parallel={"zero_stage": stage})["zero_optimization"]
    # DeepSpeed passes over a class name that it does not meet.
    layer = f"{SGTLayer.__module__}.{SGTLayer.__qualname__}"
    assert found.get("leaf_module") == ({"classes": [layer]} if stage == 3 else None)


def test_a_rank_alone_in_fp32_goes_without_zero() -> None:
    found = translated(parallel={"zero_stage": 2}, optim={"clip_grad": 0.7})
    assert (found["zero_optimization"], found["gradient_clipping"]) == ({"stage": 0}, 0.0)
    asked = translated(parallel={"zero_stage": 2}, deepspeed={"zero_optimization": {"stage": 2}})
    assert asked["zero_optimization"]["stage"] == 2


def test_what_is_always_so() -> None:
    found = translated()
    assert found["zero_allow_untested_optimizer"] is True
    assert found["wall_clock_breakdown"] is False
    assert found["timers"]["throughput"]["enabled"] is False
    assert found["steps_per_print"] > 10**9
    assert not {"optimizer", "scheduler"} & set(found)


def test_the_users_keys_are_merged_key_by_key() -> None:
    raw = {
        "zero_optimization": {"overlap_comm": True, "stage": "auto", "offload": {"device": "cpu"}},
        "fp16": {"initial_scale_power": 8, "enabled": "auto"},
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "comms_logger": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    found = translated(precision="fp16", train={"precision": "fp16"}, deepspeed=raw)
    assert found["zero_optimization"] == {"stage": 1, "overlap_comm": True, "offload": {"device": "cpu"}}
    assert found["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert found["train_batch_size"] == 2
    assert found["gradient_accumulation_steps"] == 1
    assert found["comms_logger"] == {"enabled": True}
    assert found["wall_clock_breakdown"] is True


def test_the_result_shares_nothing_with_the_configuration() -> None:
    """DeepSpeed writes into what it is given."""
    raw = {"zero_optimization": {"offload": {"device": "cpu"}}, "comms_logger": {"enabled": True}}
    config = small_config(deepspeed=raw)
    before = copy.deepcopy(config.deepspeed)
    found = deepspeed_config(config, 1, "fp32")
    found["zero_optimization"]["offload"]["device"] = "nvme"
    found["comms_logger"]["enabled"] = False
    assert config.deepspeed == before
    assert deepspeed_config(config, 1, "fp32")["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("section", "refused"),
    [
        ({}, None),
        ({"zero_optimization": {"reduce_bucket_size": 1000}}, None),
        ({"zero_optimization": {"bucket": 7}}, "bucket: Extra inputs are not permitted, got 7"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "got 'many'"),
        ({"flops_profiler": 3}, "refused by DeepSpeed"),
    ],
)
def test_what_deepspeed_refuses(section: dict[str, Any], refused: str | None) -> None:
    config = small_config(deepspeed=section)
    if refused is None:
        check_deepspeed(config, 1, "fp32")
        return
    with pytest.raises(ConfigError, match=refused):
        check_deepspeed(config, 1, "fp32")
