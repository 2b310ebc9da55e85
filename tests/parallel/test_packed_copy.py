from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megatron_sgt.parallel import packed_copy
from megatron_sgt.parallel.packed_copy import on_device


@dataclass(frozen=True)
class Inner:
    name: str
    rows: Tensor
    nothing: Tensor | None = None


@dataclass
class Outer:
    inner: Inner
    gates: Tensor
    both: tuple[Tensor, Tensor]
    kept: Tensor | None = field(default=None, init=False)


def parts() -> list[Outer | None]:
    rows = torch.arange(7)
    transposed = torch.arange(6, dtype=torch.int32).view(2, 3).T
    inner = Inner("a", rows)
    return [
        Outer(inner, torch.tensor([0.5, 1.0, 0.25]), (rows, transposed)),
        None,
        Outer(inner, torch.ones(0), (rows, rows)),
    ]


def test_values_survive_and_what_was_shared_is(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []

    def send(memory: Tensor, device: torch.device) -> Tensor:
        sent.append(memory)
        return memory.clone()

    monkeypatch.setattr(packed_copy, "_send", send)
    before = parts()
    first, nothing, last = on_device(before, torch.device("meta"))
    assert len(sent) == 1 and nothing is None
    assert first is not None and last is not None and before[0] is not None
    assert first.gates.tolist() == [0.5, 1.0, 0.25] and first.gates is not before[0].gates
    assert first.inner.name == "a" and first.inner.nothing is None and first.kept is None
    assert first.inner.rows.dtype == torch.int64 and first.inner.rows.tolist() == list(range(7))
    assert first.both[0] is first.inner.rows is last.both[0] is last.both[1]
    assert first.both[1].dtype == torch.int32 and first.both[1].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert last.gates.shape == (0,)


def test_what_lies_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is new is sent, and with nothing new nothing."""
    sizes: list[int] = []
    monkeypatch.setattr(packed_copy, "_send", lambda memory, device: sizes.append(memory.nbytes) or memory.to(device))
    there, here = torch.empty(1000, device="meta"), torch.ones(4)
    found = on_device([there, here], torch.device("meta"))
    assert found[0] is there and found[1].device.type == "meta" and sizes == [64]
    assert on_device([there], torch.device("meta"))[0] is there and len(sizes) == 1


def test_a_cpu_copies_nothing() -> None:
    before = parts()
    assert on_device(before, torch.device("cpu")) is before
