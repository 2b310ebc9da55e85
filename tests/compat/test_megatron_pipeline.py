"""The seams of Megatron-Core's schedules: what is replaced while one runs, and the scalar behind a backward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_sgt.compat import megatron_pipeline
from megatron_sgt.compat.megatron_pipeline import backward_from, run_schedule

CPU = torch.device("cpu")


def test_a_received_gradient_enters_at_an_output_without_data() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    output, gradient = x * x, torch.tensor([[10.0, -1.0]])
    output.data = torch.empty(1)  # as after it was sent
    scalar = backward_from(output, gradient)
    assert scalar.shape == ()
    scalar.backward()
    assert torch.equal(x.grad, torch.tensor([[20.0, -4.0]]))


def test_a_loss_gets_the_gradient_of_the_scalar() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (backward_from(x * x, None) * 4).backward()
    assert float(x.grad) == 24.0


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("rest", [("model type", "config"), ("config",)], ids=["0.16", "0.19"])
def test_the_backward_step_of_both_signatures(lists: bool, rest: tuple[str, ...], monkeypatch: Any) -> None:
    seen: list[Any] = []

    def backward(output: Tensor, gradient: Tensor | None) -> None:
        seen.append(gradient)
        backward_from(output, gradient).backward()

    def schedule(**arguments: Any) -> None:
        assert not arguments["forward_only"] and not arguments["collect_non_loss_data"]
        assert schedules.torch.zeros([], device="cuda").device == CPU
        assert schedules.torch.ones is torch.ones
        x = torch.ones(2, requires_grad=True)
        output, gradient = x * 3, torch.tensor([1.0, 5.0])
        wrapped = [[x], [output], [gradient]] if lists else [x, output, gradient]
        found = schedules.backward_step(*wrapped, *rest)
        assert torch.equal(found[0] if lists else found, torch.tensor([3.0, 15.0]))
        first = schedules.backward_step([None] if lists else None, (x * 2).sum(), None, *rest)
        assert first == ([None] if lists else None)
        seen.append("ran")

    before = schedules.backward_step, schedules.torch
    monkeypatch.setattr(megatron_pipeline, "get_forward_backward_func", lambda: schedule)
    chunk: Any = SimpleNamespace(vp_stage=None, set_input_tensor=lambda tensor: seen.append(tensor))
    run_schedule([chunk], lambda chunk, batch: batch, [1, 2], (2, 4), CPU, backward)
    assert torch.equal(seen[0], torch.tensor([1.0, 5.0])) and seen[1:] == [None, "ran", None]
    assert (schedules.backward_step, schedules.torch) == before


def test_what_was_replaced_is_put_back_after_an_error(monkeypatch: Any) -> None:
    def schedule(**arguments: Any) -> None:
        assert arguments["forward_only"] and arguments["num_microbatches"] == 2
        assert (arguments["micro_batch_size"], arguments["seq_length"]) == (3, 8)
        raise RuntimeError("in the schedule")

    before = schedules.backward_step, schedules.torch
    monkeypatch.setattr(megatron_pipeline, "get_forward_backward_func", lambda: schedule)
    with pytest.raises(RuntimeError, match="in the schedule"):
        run_schedule([SimpleNamespace(vp_stage=None)], lambda chunk, batch: batch, [1, 2], (3, 8), CPU)
    assert (schedules.backward_step, schedules.torch) == before
