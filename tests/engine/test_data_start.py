"""Where the data of a start goes on; what it says of it: tests/edges/test_resume_changes.py."""

import shutil
from pathlib import Path

import pytest

from megatron_sgt.data.history import order_of
from megatron_sgt.data.ledger import Ledger, Span
from megatron_sgt.engine.data_start import data_start, ledger_at
from megatron_sgt.errors import CheckpointError
from megatron_sgt.preflight import Start
from tests.helpers.datasets import write_dataset
from tests.helpers.runs import tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def test_a_fresh_start_records_its_order(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data)
    found = data_start(config, Start(None, {}))
    assert found.change is None and found.ledger == Ledger((Span(0, order_of(config)),))
    imported = data_start(config, Start(tmp_path, {"trainer": {"step": 0, "consumed_samples": 0}}))
    assert imported == found, "nothing was read by a model that was imported"


def test_going_back_before_a_change_forgets_what_was_read_since(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, train={"seed": 2})
    one, two = order_of(tiny_config(tmp_path, data, train={"seed": 1})), order_of(config)
    start = data_start(config, Start(None, {}))
    before = Ledger((Span(0, one),))
    now = before.turned(two, 40, start.begins)

    def back(consumed: int, saved: Ledger) -> list[tuple[int, int]]:
        kept = ledger_at({"trainer": {"consumed_samples": consumed}, "data": saved.to_json()}, now, start)
        spans = kept.turned(two, consumed, start.begins).spans
        return [(span.start, span.order.seed) for span in spans]

    assert [(span.start, span.order.seed) for span in now.spans] == back(64, now) == [(0, 1), (40, 2)]
    assert back(24, before) == [(0, 1), (24, 2)]
    assert ledger_at({"trainer": {"consumed_samples": 24}}, now, start) == now, "a checkpoint without a record"


def test_sizes_that_old_records_lack_are_those_of_the_files(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data)
    [entry] = Ledger((Span(0, order_of(config)),)).to_json()
    samples = entry["files"][0].pop("samples")
    saved = {"trainer": {"step": 5, "consumed_samples": 40}, "data": [entry]}
    assert data_start(config, Start(tmp_path, saved)).ledger.now.order.files[0].samples == samples > 0


def test_a_validation_set_that_was_trained_on_is_refused(data: str, tmp_path: Path) -> None:
    """Also where it is no longer in the blend, and lies elsewhere."""
    for suffix in (".bin", ".idx"):
        shutil.copy(data + suffix, tmp_path / f"copy{suffix}")
    write_dataset(tmp_path / "other", [40] * 60, 3, 64)
    ledger = Ledger((Span(0, order_of(tiny_config(tmp_path, data))),))
    start = Start(tmp_path, {"trainer": {"step": 5, "consumed_samples": 40}, "data": ledger.to_json()})
    section = {"data_path": [str(tmp_path / "other")], "valid": {"web": str(tmp_path / "copy")}}
    with pytest.raises(CheckpointError, match=r"was trained on .*walks, which is data.valid.web now"):
        data_start(tiny_config(tmp_path, data, data=section), start)
    allowed = tiny_config(tmp_path, data, data=section | {"allow_validation_leak": True})
    assert data_start(allowed, start).ledger.now.start == 40
