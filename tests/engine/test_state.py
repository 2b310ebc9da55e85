import json

import pytest

from megatron_sgt.engine.state import TrainState
from megatron_sgt.errors import CheckpointError

FIELDS = ("step", "consumed_samples", "skipped_steps", "consecutive_skipped")


def test_a_run_begins_at_zero() -> None:
    assert TrainState().state_dict() == dict.fromkeys(FIELDS, 0)


def test_round_trip_through_json() -> None:
    state = TrainState(7, 224, 3, 1)
    loaded = TrainState()
    loaded.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert loaded == state


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_counter_is_named(name: str) -> None:
    saved = TrainState(7, 224, 3, 1).state_dict()
    del saved[name]
    with pytest.raises(CheckpointError, match=f"the checkpoint's training state has no '{name}'"):
        TrainState().load_state_dict(saved)


def test_counters_of_a_later_version_are_ignored() -> None:
    state = TrainState()
    state.load_state_dict({**TrainState(7, 224, 3, 1).state_dict(), "epoch": 2})
    assert state == TrainState(7, 224, 3, 1)
