"""The record of the data in checkpoints; what a start says of it: tests/edges/test_resume_changes.py."""

from pathlib import Path

import pytest

from megatron_sgt.data.history import Span, order_of, to_json
from megatron_sgt.engine.data_start import data_start, record_at
from megatron_sgt.preflight import Start
from tests.helpers.runs import tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def test_a_fresh_start_records_its_order(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data)
    found = data_start(config, Start(None, {}))
    assert found.change is None and found.record == to_json((), order_of(config), 0)
    imported = data_start(config, Start(tmp_path, {"trainer": {"consumed_samples": 0}}))
    assert imported == found, "nothing was read by a model that was imported"


def test_going_back_before_a_change_forgets_what_was_read_since(data: str, tmp_path: Path) -> None:
    one, two = (order_of(tiny_config(tmp_path, data, train={"seed": seed})) for seed in (1, 2))
    before, now = to_json((), one, 0), to_json([Span(one, 0, 40)], two, 40)
    assert [entry["from_sample"] for entry in now] == [0, 40]
    back = record_at({"trainer": {"consumed_samples": 24}, "data": before}, now)
    assert [(entry["from_sample"], entry["seed"]) for entry in back] == [(0, 1), (24, 2)]
    within = record_at({"trainer": {"consumed_samples": 64}, "data": now}, now)
    assert [(entry["from_sample"], entry["seed"]) for entry in within] == [(0, 1), (40, 2)]
