import json

import pytest

from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan

GROWN = LoopPlan(
    6,
    (
        (4, LayerPlan(block_loops=1)),
        (3, LayerPlan(loops=2, kept_heads=(0, 1))),
        (2, LayerPlan(loops=1, kept_heads=(1, 3), other_gate=0.1)),
    ),
)


@pytest.mark.parametrize(
    ("plan", "phase"),
    [
        (LayerPlan(), "off"),
        (LayerPlan(block_loops=2), "off"),
        (LayerPlan(skipped=True), "off"),
        (LayerPlan(loops=1, kept_heads=(0,), other_gate=1.0), "window"),
        (LayerPlan(loops=1, kept_heads=(0,), other_gate=1e-8), "window"),
        (LayerPlan(loops=3, kept_heads=(0,)), "sparse"),
    ],
)
def test_phase(plan: LayerPlan, phase: str) -> None:
    assert plan.phase == phase


@pytest.mark.parametrize(
    "values",
    [
        {"loops": -1},
        {"block_loops": -1},
        {"loops": 1, "kept_heads": (0,), "other_gate": 1.5},
        {"loops": 1, "kept_heads": (0,), "other_gate": float("nan")},
        {"loops": 1, "kept_heads": (2, 1)},
        {"loops": 1, "kept_heads": (1, 1)},
        {"loops": 1, "kept_heads": (-1, 1)},
        {"loops": 1},
        {"kept_heads": (1,)},
        {"other_gate": 0.5},
        {"skipped": True, "block_loops": 1},
        {"skipped": True, "loops": 1, "kept_heads": (0,)},
    ],
)
def test_impossible_layer_plans_are_refused(values: dict) -> None:
    with pytest.raises(ValueError):
        LayerPlan(**values)


def test_lookup_knows_every_layer_and_no_other() -> None:
    assert [plan.loops for plan in GROWN] == [0, 0, 1, 2, 0, 0]
    assert GROWN[0] == LayerPlan()
    assert GROWN[2].kept_heads == (1, 3)
    for outside in (-1, 6):
        with pytest.raises(IndexError, match="6 layers"):
            GROWN[outside]


@pytest.mark.parametrize("ids", [(6,), (-1,), (2, 2)])
def test_impossible_layer_ids_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        LoopPlan(6, tuple((n, LayerPlan(block_loops=1)) for n in ids))


def test_equal_execution_means_equal_plans() -> None:
    shuffled = LoopPlan(6, (GROWN.layers[1], (0, LayerPlan()), GROWN.layers[0], GROWN.layers[2]))
    assert shuffled == GROWN
    assert shuffled.fingerprint() == GROWN.fingerprint()
    assert LoopPlan(6, ((1, LayerPlan()),)) == LoopPlan.empty(6)


@pytest.mark.parametrize(
    "other",
    [
        LoopPlan.empty(6),
        LoopPlan(7, GROWN.layers),
        LoopPlan(6, GROWN.layers[1:]),
        LoopPlan(6, ((2, LayerPlan(1, (1, 3), 0.2)), *GROWN.layers[1:])),
        LoopPlan(6, ((2, LayerPlan(1, (1, 2), 0.1)), *GROWN.layers[1:])),
        LoopPlan(6, ((2, LayerPlan(2, (1, 3), 0.1)), *GROWN.layers[1:])),
        LoopPlan(6, ((2, LayerPlan(1, (1, 3), 0.1, block_loops=1)), *GROWN.layers[1:])),
        LoopPlan(6, ((1, LayerPlan(1, (1, 3), 0.1)), *GROWN.layers[1:])),
        LoopPlan(6, ((1, LayerPlan(skipped=True)), *GROWN.layers)),
    ],
)
def test_fingerprint_follows_equality(other: LoopPlan) -> None:
    assert (other.fingerprint() == GROWN.fingerprint()) == (other == GROWN)


def test_fingerprint_sees_the_last_bit_of_a_gate() -> None:
    gates = (0.1, 0.10000000000000002)
    first, second = (LoopPlan(2, ((0, LayerPlan(1, (0,), gate)),)) for gate in gates)
    assert first.fingerprint() != second.fingerprint()


def test_fingerprint_is_the_same_in_every_process() -> None:
    expected = "223a1aa9f6ff35f6789e5eec905efeea7e1fd85cacfbf1353d27ee915af04a19"
    assert GROWN.fingerprint() == expected


def test_inference_closes_the_window_and_keeps_everything_else() -> None:
    plan = GROWN.inference()
    assert [p.other_gate for p in plan] == [0.0] * 6
    assert plan[2] == LayerPlan(1, (1, 3))
    assert plan[3] == GROWN[3]
    assert plan[4] == GROWN[4]
    assert LoopPlan.empty(3).inference() == LoopPlan.empty(3)


def test_dict_round_trip_through_json() -> None:
    for plan in (GROWN, GROWN.skipping({0, 5})):
        assert LoopPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_sub_net_lacks_layers_and_keeps_the_rest() -> None:
    plan = GROWN.skipping({0, 3})
    assert [layer.executions for layer in plan] == [0, 1, 1, 0, 2, 1]
    assert plan[2] == GROWN[2] and plan[3] == LayerPlan(skipped=True)
    assert GROWN.skipping(()) == GROWN


def test_event_dict_is_plain_json() -> None:
    event = GrowthEvent(20, "select_new_layer", 2, "selecting", {3: (0, 1), 2: (1, 2)}, (0, 0, 1, 1), 0.5)
    assert json.loads(json.dumps(event.to_dict())) == {
        "step": 20,
        "action": "select_new_layer",
        "layer": 2,
        "phase": "selecting",
        "kept_heads": {"2": [1, 2], "3": [0, 1]},
        "loop_depth": [0, 0, 1, 1],
        "layer_score": 0.5,
    }
