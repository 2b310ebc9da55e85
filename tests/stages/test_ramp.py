"""The mask that fades in new parts: its value, what it multiplies, when the model may grow again."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt import extensions
from megatron_sgt.arch.ffn import FFNKind
from megatron_sgt.config.growth import RampConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.ramp import mask_at, masked_weights
from megatron_sgt.stages.stages import stages_of
from tests.helpers.growing import shape
from tests.helpers.single import small_config

BOTH = {"ffn_hidden_size": 24, "num_layers": 5, "ramp_steps": 4}


def msg(until: int, **options: Any) -> dict[str, Any]:
    return {"until_steps": until, "operator": "msg", "options": options}


def test_it_rises_with_the_applied_steps() -> None:
    ramp = RampConfig(first=10, steps=4, old_units=3)
    values = [mask_at(ramp, step) for step in (0, 10, 11, 12, 13, 14, 15, 1000)]
    assert values == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1] and ramp.end == 14
    assert mask_at(None, 3) == 1


def test_a_ramp_makes_new_parts_that_write() -> None:
    growth = OPERATORS["msg"](shape(), BOTH)
    assert growth.ramp is not None and growth.preserves and not growth.silent
    assert (growth.ramp.steps, growth.ramp.layers, growth.ramp.old_units) == (4, (3, 4), 20)
    assert growth.layers == (0, 1, 2, 0, 1)
    without = OPERATORS["msg"](shape(), BOTH | {"ramp_steps": 0})
    assert without.ramp is None and without.silent == {3, 4}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("swiglu", {"gate_proj": 20, "up_proj": None}), ("gelu", {"up_proj": 20})],
)
def test_what_is_multiplied(kind: str, rows: dict[str, int | None]) -> None:
    """New rows of what enters the activation, in every layer; all that a new layer writes."""
    model = shape(activation=kind, ffn_hidden_size=24, num_layers=4, add_bias_linear=True)
    found = masked_weights(model, RampConfig(first=0, steps=1, layers=(3,), old_units=20))
    units = {name: one for name, one in found.items() if "linear_fc1" in name}
    assert sorted(units) == [f"decoder.layers.{n}.mlp.linear_fc1.{p}" for n in range(4) for p in ("bias", "weight")]
    for one in units.values():
        assert {name.split(".")[-2]: row for name, row in zip(one.weight.hf, one.rows, strict=True)} == rows
    layers = {name: one.rows for name, one in found.items() if name not in units}
    writes = ("mlp.linear_fc2", "self_attention.linear_proj")
    assert layers == {f"decoder.layers.3.{name}.{p}": (0,) for name in writes for p in ("bias", "weight")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30, "ramp_steps": 4}, "msg: ramp_steps 4: a mask fades in ffn_hidden_size and num_layers"),
        ({"num_layers": 4, "num_attention_heads": 6, "ramp_steps": 4}, "alone, and num_attention_heads grows too"),
        ({"ramp_steps": 4}, "nothing grows; give the size"),
        ({"num_layers": 4, "ramp_steps": -1}, "ramp_steps: must be >= 0"),
    ],
)  # fmt: skip
def test_what_no_mask_can_fade_in_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OPERATORS["msg"](shape(), options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_kind_must_say_where_its_units_are_activated() -> None:
    extensions.register("ffn", "silent", FFNKind("gelu", gated=False, hidden_act="gelu", saved=2))
    try:
        model = shape(activation="silent")
        with pytest.raises(ConfigError, match=r"ramp_steps 4: the record of activation silent does not say"):
            OPERATORS["msg"](model, {"ffn_hidden_size": 24, "ramp_steps": 4})
        assert OPERATORS["msg"](model, {"num_layers": 4, "ramp_steps": 4}).ramp is not None
    finally:
        extensions.unregister("ffn", "silent")


def test_the_configuration_of_a_stage_says_what_is_faded_in() -> None:
    config = small_config(
        growth={"stages": [msg(3, ffn_hidden_size=128, ramp_steps=2), msg(5, num_layers=6, ramp_steps=4)]}
    )
    first, second, third = (stage.config.growth.ramp for stage in stages_of(config))
    assert first is None
    assert second == RampConfig(first=3, steps=2, old_units=96)
    assert third == RampConfig(first=5, steps=4, layers=(4, 5)), "what was faded in before is no longer new"
    assert stages_of(config)[1].record()["options"] == {"ffn_hidden_size": 128, "ramp_steps": 2}
    plain = small_config(growth={"stages": [msg(3, num_layers=6, ramp_steps=2), msg(5, num_layers=7)]})
    assert stages_of(plain)[2].config.growth.ramp is None


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([msg(3, num_layers=6, ramp_steps=3), msg(5, num_layers=7)],
         r"growth\.stages\[1\]: the model is faded in until step 6 and cannot grow again after step 5"),
        ([msg(3, num_layers=6, ramp_steps=8)],
         r"growth\.stages\[0\]: the model is faded in until step 11, but the run ends at train\.train_iters 10"),
    ],
)  # fmt: skip
def test_a_stage_is_as_long_as_its_ramp(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(small_config(growth={"stages": stages}))


def test_a_run_is_as_long_as_the_ramp_of_its_checkpoint() -> None:
    ramp = {"first": 4, "steps": 6, "layers": [3]}
    (only,) = stages_of(small_config(growth={"ramp": ramp}))
    assert only.config.growth.ramp == RampConfig(**ramp)
    with pytest.raises(ConfigError, match=r"^growth\.ramp: the model is faded in until step 10, but .*train_iters 6"):
        stages_of(small_config(growth={"ramp": ramp}, train={"train_iters": 6}))


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ({}, "nothing is faded in"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"layers": [4]}, r"growth\.ramp\.layers: \[4\] outside the model's layers 0\.\.3"),
        ({"layers": [0, 1, 2, 3]}, r"growth\.ramp\.layers: names all 4 layers"),
        ({"old_units": 96}, r"growth\.ramp\.old_units: 96 leaves no new ones of model\.ffn_hidden_size 96"),
        ({"old_units": 9, "steps": 0}, "greater than 0"),
    ],
)
def test_a_ramp_written_by_hand_must_fit_the_model(ramp: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(growth={"ramp": {"first": 0, "steps": 2, **ramp}})
