"""What the small files of a checkpoint must look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import FormError, known_layout, read_config, read_state, whole
from megatron_sgt.errors import DamagedCheckpointError
from tests.helpers.checkpoints import write_plain_checkpoint
from tests.helpers.deepspeed_files import counters

WHERE = {"tensor_model_parallel_size": 2, "data_parallel_size": 1, "zero_stage": 1, "precision": "fp32"}


def free(**made: Any) -> dict[str, Any]:
    """The state of a layout-free checkpoint that says ``made`` of itself."""
    made = {"optimizer_step": 1, "loss_scale": None, "source_layout": WHERE, **made}
    return {"trainer": counters(1), "hooks": {}, "layout": None, "layout_free": made}


@pytest.mark.parametrize("value", [None, True, 1.0, "1", -1, 10**400, [1], {}])
def test_a_whole_number(value: Any) -> None:
    with pytest.raises(FormError, match=r"^steps is .*, not a whole number from 0 on$") as caught:
        whole(value, "steps")
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "change",
    [
        {"zero_stage": 4},
        {"data_parallel_size": 0},
        {"precision": 3},
        {"tensor_model_parallel_size": "2"},
        {"pipeline_model_parallel_size": 1, "pipeline_model_parallel_layout": [4]},
        {"pipeline_model_parallel_layout": [2, 2]},
        {"pipeline_model_parallel_layout": "2,2", "pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_layout": [2, 1, 1], "pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_layout": [4, 0], "pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_layout": None, "pipeline_model_parallel_size": 2},
    ],
)
def test_a_layout(change: dict[str, Any]) -> None:
    known_layout(WHERE, "layout")
    known_layout({**WHERE, "pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": [2, 1, 1, 1]}, "layout")
    known_layout(None, "layout")
    with pytest.raises(FormError, match=next(iter(change)).rsplit("_", 1)[0]):
        known_layout({**WHERE, **change}, "layout")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "trainer is None"),
        ({"trainer": {"step": 1}}, "trainer.consumed_samples is None"),
        ({"trainer": counters(1), "hooks": {"a": 3}, "layout": WHERE}, "hooks.a is 3"),
        ({"trainer": counters(1), "hooks": {}}, "layout is missing"),
        ({"trainer": counters(1), "hooks": {}, "layout": None}, "layout_free is None"),
        (free(quantities=["exp_avg"]), "layout_free.quantities is a list"),
        (free(quantities="weights"), "layout_free.quantities is 'weights'"),
        (free(stage=-1), "layout_free.stage is -1"),
        ({"trainer": counters(1), "hooks": {}, "layout": WHERE, "ema": 0.9}, "ema is 0.9, not an object"),
        ({"trainer": counters(1), "hooks": {}, "layout": WHERE, "ema": {"decay": "a"}}, "ema.decay is 'a'"),
        ({"trainer": counters(1), "hooks": {}, "layout": WHERE, "ema": {"decay": 1.0}}, "ema.decay is 1.0"),
        ({"trainer": counters(1), "hooks": {"growth": {"schedule": {}}}, "layout": WHERE}, "events is None"),
    ],
)
def test_a_state(state: dict[str, Any], said: str, tmp_path: Path) -> None:
    layout.write_json(tmp_path / layout.STATE_FILE, state)
    with pytest.raises(
        DamagedCheckpointError, match=rf"sgt_state\.json is damaged: .*{said}.*copy the checkpoint again"
    ):
        read_state(tmp_path)


BEGUN = {
    "step": 1, "operator": "midas", "options": {}, "moments": "copy", "optimizer": "continue", "lr_policy": "continue",
    "weights": "weights",
}  # fmt: skip


@pytest.mark.parametrize(
    "stages",
    [3, [3], [BEGUN, BEGUN], [{**BEGUN, "step": 4}], [{**BEGUN, "options": []}], [{**BEGUN, "operator": None}]],
)
def test_a_record_of_the_stages(stages: Any, tmp_path: Path) -> None:
    state = {"trainer": counters(3), "hooks": {}, "layout": WHERE}
    whole_one = [BEGUN, {**BEGUN, "step": 3}]
    layout.write_json(tmp_path / layout.STATE_FILE, {**state, "stages": whole_one})
    assert read_state(tmp_path)["stages"] == whole_one
    layout.write_json(tmp_path / layout.STATE_FILE, {**state, "stages": stages})
    with pytest.raises(DamagedCheckpointError, match=r"sgt_state\.json is damaged: .*stages"):
        read_state(tmp_path)


FILE = {"weight": 1.0, "prefix": "a", "documents": 3, "tokens": 9, "lengths": "0a", "content": "0b"}
ORDER = {
    "from_sample": 0, "dataset": "indexed", "seq_length": 8, "seed": 2**63, "split": "9,1", "shares": [0.9, 0.1, 0.0],
    "files": [FILE],
}  # fmt: skip


@pytest.mark.parametrize(
    "orders",
    [
        3,
        [3],
        [{**ORDER, "from_sample": 10**6}],
        [{**ORDER, "from_sample": 5}, ORDER],
        [{**ORDER, "seq_length": 0}],
        [{**ORDER, "seed": -1}],
        [{**ORDER, "split": None}],
        [{**ORDER, "shares": [1.0, 0.0]}],
        [{**ORDER, "shares": [2.0, 0.0, 0.0]}],
        [{**ORDER, "files": {}}],
        [{**ORDER, "files": [{**FILE, "weight": 1e-9}]}],
        [{**ORDER, "files": [{**FILE, "documents": "3"}]}],
        [{**ORDER, "files": [{**FILE, "content": 1}]}],
    ],
)
def test_a_record_of_the_data(orders: Any, tmp_path: Path) -> None:
    state = {"trainer": {**counters(1), "consumed_samples": 9}, "hooks": {}, "layout": WHERE}
    whole_one = [ORDER, {**ORDER, "from_sample": 9}]
    layout.write_json(tmp_path / layout.STATE_FILE, {**state, "data": whole_one})
    assert read_state(tmp_path)["data"] == whole_one
    layout.write_json(tmp_path / layout.STATE_FILE, {**state, "data": orders})
    with pytest.raises(DamagedCheckpointError, match=r"sgt_state\.json is damaged: .*data"):
        read_state(tmp_path)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    folder = write_plain_checkpoint(tmp_path / "global_step3")
    assert read_state(folder)["trainer"] == counters(3)
    assert read_config(folder).model.num_layers == 4
    layout.write_json(folder / layout.STATE_FILE, free(quantities=["weights"], stage=2))
    assert read_state(folder)["layout_free"]["stage"] == 2
    (folder / layout.CONFIG_FILE).write_text("model: [")
    with pytest.raises(DamagedCheckpointError, match=r"config\.yaml cannot be read: .*not valid YAML"):
        read_config(folder)
