from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.engine_state import _prepare_states, load_into_engine, masters_of
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, QUANTITIES
from megatron_sgt.errors import CheckpointError
from megatron_sgt.optim.ema import WeightAverage
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.planning.pipeline import pipeline_layout
from tests.helpers.deepspeed_files import STEP, odd_config, random_state, rank_state, stage_state, write_checkpoint
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.resharding import load_and_look

OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train": {"precision": "bf16"}},
    "bf16_with_bf16_gradients": {
        "train": {"precision": "bf16"},
        "optim": {"grad_accum_dtype": "model"},
    },
    "two_groups": {"optim": {"weight_decay_on": "matrices"}},
    "aligned": {"deepspeed": {"zero_optimization": {"parameter_alignment": True}}},
    "small_sub_groups": {
        "optim": {"weight_decay_on": "matrices"},
        "deepspeed": {"zero_optimization": {"sub_group_size": 500, "stage3_param_persistence_threshold": 30}},
    },
}


@pytest.mark.parametrize(
    ("where", "options", "steps_before"),
    [
        ((2, 1, 0), "two_groups", 0),
        ((1, 1, 0), "fp32", 2),
        ((2, 2, 1), "two_groups", 0),
        ((1, 3, 1), "bf16", 2),
        ((1, 2, 1), "bf16", 0),
        ((1, 2, 1), "bf16_with_bf16_gradients", 0),
        ((1, 3, 2), "aligned", 2),
        ((1, 3, 3), "fp32", 0),
        ((2, 2, 3), "small_sub_groups", 2),
        ((1, 2, 3), "bf16", 0),
    ],
)
def test_deepspeed_sees_the_state_bit_for_bit(
    where: tuple[int, int, int], options: str, steps_before: int, tmp_path: Path
) -> None:
    tp_size, dp_size, stage = where
    plain = odd_config()
    state = random_state(plain)
    folder, *_ = convert(write_checkpoint(tmp_path / "from", plain, state, (1, 1, 0)), tmp_path / "to")
    layout = {"tensor_model_parallel_size": tp_size, "zero_stage": stage, "device": "cpu"}
    chosen = OPTIONS[options]
    train = {"micro_batch_size": 1, "global_batch_size": 6, **chosen.get("train", {})}
    config = odd_config({**chosen, "train": train, "parallel": layout})
    for seen in run_on_ranks(tp_size * dp_size, load_and_look, config, folder, steps_before):
        expected = rank_state(config, state, tp_size, seen["tp_rank"])
        for quantity, tensors in expected.items():
            for name, tensor in tensors.items():
                assert torch.equal(seen["state"][quantity][name], tensor), (quantity, name)
        for name, weight in seen["model"].items():
            assert torch.equal(weight, expected["weights"][name].to(weight.dtype)), name
        assert seen["settings_kept"] and seen["own_step_tensors"]
        assert set(seen["steps"]) == {STEP} and set(seen["steps_after"]) == {STEP + 1}
        assert 0 < seen["norm"] < float("inf")


def test_states_are_made_as_the_optimizer_would_make_them() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    real = torch.optim.AdamW([weight], capturable=False)
    weight.grad = torch.ones_like(weight)
    real.step()
    made = torch.optim.AdamW([weight])
    values = _prepare_states(made, [weight], 9)
    assert made.state[weight].keys() == real.state[weight].keys()
    for name, tensor in real.state[weight].items():
        ours = made.state[weight][name]
        assert (ours.dtype, ours.shape, ours.device) == (tensor.dtype, tensor.shape, tensor.device), name
    assert made.state[weight]["step"] == 9
    values["exp_avg"][0][5] = 1.0
    assert made.state[weight]["exp_avg"][1, 2] == 1.0
    assert not weight.data.any()


def test_apex_counts_in_the_group() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    state: dict[torch.Tensor, dict[str, Any]] = {weight: {}}
    groups: list[dict[str, Any]] = [{"bias_correction": True}, {"bias_correction": True}]
    _prepare_states(SimpleNamespace(param_groups=groups, state=state), [weight], 9)
    assert [group["step"] for group in groups] == [9, 9]
    assert set(state[weight]) == {"exp_avg", "exp_avg_sq"}


def fake_engine(optimizer: Any, module: torch.nn.Module) -> Any:
    return SimpleNamespace(optimizer=optimizer, module=module, zero_optimization_stage=lambda: 0)


def test_nvme_is_refused() -> None:
    engine = fake_engine(SimpleNamespace(swap_optimizer=True), torch.nn.Linear(1, 1))
    reader: Any = None
    with pytest.raises(CheckpointError, match="offload to NVMe"):
        load_into_engine(reader, 1, None, odd_config(), engine, fake_groups())


def test_another_model_is_refused() -> None:
    module = torch.nn.Linear(1, 1)
    engine = fake_engine(torch.optim.AdamW(module.parameters()), module)
    reader: Any = None
    with pytest.raises(CheckpointError, match="differ from its weight table"):
        load_into_engine(reader, 1, None, odd_config(), engine, fake_groups())


class NumberReader:
    """A checkpoint whose tensors count their elements."""

    quantities = QUANTITIES

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes

    def shard(self, entry: Any, *_: Any) -> torch.Tensor:
        shape = self.shapes[f"gpt.{entry.megatron}"]
        return torch.arange(float(shape.numel())).view(shape)


def numbered() -> tuple[Any, dict[str, torch.nn.Parameter], Any, Any]:
    """A run of a model of one layer, its parameters, a reader of numbers for them, and an engine without ZeRO."""
    config = odd_config(num_layers=1)
    state = rank_state(config, random_state(config))["weights"]
    module = torch.nn.Module()
    module.named_parameters = lambda *a, **k: iter(parameters.items())  # type: ignore[method-assign]
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.items()}
    reader = NumberReader({name: tensor.shape for name, tensor in state.items()})
    return config, parameters, reader, fake_engine(torch.optim.AdamW(parameters.values()), module)


@pytest.mark.parametrize("held", [True, False])
def test_an_average_is_read_or_starts_from_the_weights_that_were_read(held: bool) -> None:
    config, parameters, reader, engine = numbered()
    reader.quantities = (*QUANTITIES, AVERAGE) if held else QUANTITIES
    shard = reader.shard
    reader.shard = lambda entry, quantity, *rest: shard(entry) + (1000 if quantity == AVERAGE else 0)
    average = WeightAverage(masters_of(engine, fake_groups()).tensors, 0.9)
    load_into_engine(reader, 3, None, config, engine, fake_groups(), average)
    for tensor, parameter in zip(average.tensors, parameters.values(), strict=True):
        assert torch.equal(tensor, parameter.data + (1000 if held else 0))


def test_a_run_without_an_average_leaves_a_held_one_out() -> None:
    config, parameters, reader, engine = numbered()
    reader.quantities = (*QUANTITIES, AVERAGE)
    load_into_engine(reader, 3, None, config, engine, fake_groups())
    assert all(torch.equal(p.data.flatten(), torch.arange(float(p.numel()))) for p in parameters.values())


def test_a_stage_of_a_pipeline_reads_its_own_weights_alone() -> None:
    cut = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "2,1"}
    config = odd_config({"parallel": cut}, num_layers=3)
    shards = rank_state(config, random_state(config))

    def alone(stage: int) -> ParallelGroups:
        return replace(fake_groups(pp_rank=stage, pp_size=2), world_size=1)

    for stage in (0, 1):
        state = stage_state(config, shards, pipeline_layout(config), stage)["weights"]
        parameters = {name: torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in state.items()}
        module = torch.nn.Module()
        module.named_parameters = lambda *a, found=parameters, **k: iter(found.items())  # type: ignore[method-assign]
        engine = fake_engine(torch.optim.AdamW(parameters.values()), module)
        reader: Any = NumberReader({name: tensor.shape for name, tensor in state.items()})
        load_into_engine(reader, 3, None, config, engine, alone(stage))
        for parameter in parameters.values():
            assert torch.equal(parameter.data.flatten(), torch.arange(float(parameter.numel())))
        with pytest.raises(CheckpointError, match="differ from its weight table"):
            load_into_engine(reader, 3, None, config, engine, alone(1 - stage))


def test_a_dynamic_loss_scale_continues() -> None:
    config, parameters, reader, engine = numbered()
    optimizer = engine.optimizer
    optimizer.dynamic_loss_scale, optimizer.loss_scaler = True, SimpleNamespace(cur_scale=65536.0)
    load_into_engine(reader, 3, 64.0, config, engine, fake_groups())
    assert optimizer.loss_scaler.cur_scale == 64.0
    for weight in weights(config.model):
        loaded = parameters[f"gpt.{weight.megatron}"].data
        assert torch.equal(loaded.flatten(), torch.arange(float(loaded.numel())))
