"""What a run whose model grows cannot do, by what installed packages add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_sgt import extensions
from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.limits import check_layout, check_optimizer, check_schedule
from megatron_sgt.stages.operators import OPERATORS, operator_named
from megatron_sgt.stages.stages import stages_of
from tests.growth.test_schedule import Upwards
from tests.helpers.single import small_config

STAGES = {"stages": [{"until_steps": 3, "operator": "g_stack", "options": {"factor": 2}}]}


@pytest.fixture
def installed() -> Iterator[None]:
    extensions.register("schedules", "upwards", Upwards)
    extensions.register("optimizers", "lion", object())
    yield
    extensions.unregister("schedules", "upwards")
    extensions.unregister("optimizers", "lion")


def config(**sections: dict[str, Any]) -> Config:
    return small_config(**{"growth": STAGES, **sections})


@pytest.mark.usefixtures("installed")
def test_an_optimizer_whose_state_is_not_known() -> None:
    lion = config(optim={"optimizer": "lion"})
    for check in (check_optimizer, stages_of):
        with pytest.raises(ConfigError, match=r"growth\.stages: optim\.optimizer is lion.*set optim\.optimizer: adamw"):
            check(lion)
    stages_of(small_config(optim={"optimizer": "lion"}))


@pytest.mark.usefixtures("installed")
def test_a_schedule_that_cannot_go_on() -> None:
    with pytest.raises(ConfigError, match=r"growth\.stages\[0\]: growth\.method: upwards has no method inherit"):
        stages_of(config(growth={**STAGES, "method": "upwards"}))


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_where_the_optimizer_is(device: str) -> None:
    offload = {"device": device, **({"nvme_path": "/nowhere"} if device == "nvme" else {})}
    offloaded = config(deepspeed={"zero_optimization": {"offload_optimizer": offload}})
    if device != "nvme":
        check_optimizer(offloaded)
        return
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device is nvme.*set it to cpu"):
        check_optimizer(offloaded)


def test_static_loops_go_on() -> None:
    looped = config(growth={**STAGES, "method": "block_loop", "block_loop_layers": [1, 2]})
    assert stages_of(looped)[1].config.growth.block_loop_layers == (1, 2, 5, 6)
    check_schedule(looped, OPERATORS["g_stack"](looped.model, {}), 3)


@pytest.mark.parametrize("layout", ["auto", "1,3", (1, 3)])
def test_a_layout_fits_one_number_of_layers(layout: Any) -> None:
    """``auto`` cuts the model of each stage; a wider model has as many layers."""
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": layout}
    deeper = config(parallel=parallel, model={"num_layers": 4})
    growth = operator_named("g_stack")(deeper.model, {"factor": 2})
    wider = operator_named("msg")(deeper.model, {"ffn_hidden_size": 2 * deeper.model.ffn_hidden_size})
    check_layout(deeper, wider)
    if layout == "auto":
        check_layout(deeper, growth)
        stages_of(deeper)
        return
    for check in (lambda: check_layout(deeper, growth), lambda: stages_of(deeper)):
        with pytest.raises(ConfigError, match=r"cuts 4 layers, and the model grows to 8; set auto"):
            check()
