"""Whatever operations loops of a run call, with which shapes, the warm-up has called before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sgt.config import Config
from megatron_sgt.engine.build import start_processes
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import gpt, warm_up
from megatron_sgt.model.apply_plan import apply_plan, begin_step, mark_micro_batch
from megatron_sgt.model.gpt import build_model
from megatron_sgt.model.warm_up import warm_up_loops
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, single_groups, small_config
from tests.helpers.variants import ATTENTION_VARIANTS

Call = tuple[Any, ...]
READS_VIEWS = {"sgt::attend", "sgt::attend_backward", "sgt::last_row_entropy"}
"""Operations that are given strides; the others make their arguments contiguous."""


def fake_triton(put: Callable[..., None]) -> None:
    """Loops call the fused operations, which run as their definitions here."""
    for module in (gpt, warm_up):
        put(module, "loop_backend", lambda *_: ("triton", ""))


class FusedCalls(TorchDispatchMode):
    """The project's own operations that were called: name, shapes, strides, types and numbers of the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[Call] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "sgt":
            views = function.name() in READS_VIEWS
            self.calls.add((function.name(), *(described(a, views) for a in args)))
        return function(*args, **(kwargs or {}))


def described(argument: Any, views: bool) -> Any:
    if isinstance(argument, Tensor) and not views:
        return tuple(argument.shape), argument.dtype
    if isinstance(argument, Tensor):
        # A stride along a dimension of one element means nothing.
        strides = tuple(s for s, n in zip(argument.stride(), argument.shape, strict=True) if n > 1)
        return tuple(argument.shape), strides, argument.dtype
    return argument


def kept_choices(config: Config) -> Iterator[tuple[int, ...]]:
    yield from itertools.combinations(range(config.model.num_attention_heads), config.growth.num_keep_heads)


def launches(config: Config, groups: Any, training: bool) -> set[Call]:
    """Of the warm-up, or of a model that goes through windows and loops of all choices of heads."""
    if not training:
        with FusedCalls() as warm:
            assert warm_up_loops(config, groups, "fp32")
        return warm.calls
    model = build_model(config, groups, "fp32", 2).train()
    with FusedCalls() as called:
        for kept, gate, measure in itertools.product(kept_choices(config), (0.0, 0.5), (True, False)):
            apply_plan(model, LoopPlan(2, ((1, LayerPlan(1, kept, gate)),)))
            model.meter.enabled = measure
            begin_step(model)
            mark_micro_batch(model, last=True)
            for length in config.seq_lengths.every:
                pieces = config.model.seq_length // length
                for batch in batches(config):
                    model(**model.inputs(batch, torch.device("cpu"), pieces=pieces)).backward()
    return called.calls


def batches(config: Config) -> Iterator[dict[str, Tensor]]:
    """One without documents; where they are told also one with documents, cut as well."""
    batch = random_batch(config)
    if not config.data.tells_documents:
        yield batch
        return
    size, length = batch["tokens"].shape
    place = torch.arange(length, dtype=torch.int32).expand(size, -1)
    for each in (length, 5):
        yield {**batch, "document_starts": place // each * each, "num_tokens": torch.full((size,), length).int()}


def warm_up_config(kind: str, **sections: dict[str, Any]) -> Config:
    return small_config(
        model={"num_layers": 2, "seq_length": 16, **sections.get("model", {})},
        growth={"max_loop_depth": 1, "exclude_layers": [], "top_k_layers": 2},
        parallel=sections.get("parallel", {}),
        train={"loop_attention": kind},
        data={"seq_length_curriculum": [{"until_steps": 1, "seq_length": 8}], **sections.get("data", {})},
    )


VARIANTS = [(variant, kind, False) for variant in ATTENTION_VARIANTS for kind in ("custom", "library")]


@pytest.mark.parametrize(("variant", "kind", "documents"), [*VARIANTS, ("grouped_query", "custom", True)])
def test_loops_call_nothing_new(variant: str, kind: str, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_triton(monkeypatch.setattr)
    told = dict.fromkeys(("reset_attention_mask", "reset_position_ids"), documents)
    config = warm_up_config(kind, model=ATTENTION_VARIANTS[variant], data=told)
    groups = single_groups(config)
    state = torch.get_rng_state()
    warm = launches(config, groups, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    used = launches(config, groups, training=True)
    assert len(used) >= 8
    assert used <= warm, sorted(map(str, used - warm))


def on_ranks(info: RankInfo, layouts: list[dict[str, Any]]) -> list[list[str]]:
    """What the warm-up has missed, by layout."""
    fake_triton(setattr)
    missed = []
    for layout in layouts:
        told = dict.fromkeys(("reset_attention_mask", "reset_position_ids"), layout["loop_method"] == "balanced")
        model = {"num_attention_heads": 4, "num_query_groups": 2}
        parallel = {"tensor_model_parallel_size": 2, **layout}
        config = warm_up_config("custom", model=model, parallel=parallel, data=told)
        groups = start_processes(config, info)
        warm, used = (launches(config, groups, training) for training in (False, True))
        assert used
        missed.append(sorted(map(str, used - warm)))
    return missed


def test_loops_of_several_ranks_call_nothing_new() -> None:
    layouts = [
        {"loop_method": method, "sequence_parallel": sharded}
        for method in ("owner", "balanced")
        for sharded in (False, True)
    ]
    for missed in run_on_ranks(2, on_ranks, layouts):
        assert missed == [[], [], [], []]


def test_a_model_that_does_not_loop_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has one whose loops go through torch, as on a CPU."""
    looping, vanilla = small_config(), small_config(growth={"method": "vanilla"})
    groups = single_groups(looping)
    with FusedCalls() as called:
        assert warm_up_loops(looping, groups, "fp32") == 0
        fake_triton(monkeypatch.setattr)
        assert warm_up_loops(vanilla, groups, "fp32") == 0
    assert not called.calls
