"""What phases cost: their FLOPs and tokens add up to those of the run, step by step."""

from __future__ import annotations

from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import at_length, step_flops
from megatron_sgt.planning.hardware import find_gpu
from megatron_sgt.planning.phases import parts_within, phase_lines
from megatron_sgt.planning.plan import make_plan
from megatron_sgt.planning.render import render
from megatron_sgt.planning.step_time import Machine
from tests.helpers.single import small_config

PHASES: list[dict[str, Any]] = [
    {"until_steps": 10, "name": "stable"},
    {"until_steps": 16, "global_batch_size": [4, 8], "seq_length": 16, "name": "long"},
    {"lr_decay_style": "linear", "min_lr": 0.0},
]


def config(method: str = "vanilla") -> Config:
    return small_config(PHASES, growth={"method": method}, train={"train_iters": 20, "global_batch_size": 4})


def test_the_steps_are_divided_where_a_phase_ends_or_the_length_changes() -> None:
    spans = [(span.first, span.last, span.seq_length) for span in parts_within(config(), 3, 18)]
    assert spans == [(3, 10, 32), (11, 16, 16), (17, 18, 16)]


def test_each_phase_has_its_tokens_and_flops() -> None:
    made = config()
    plan = make_plan(made, 1, Machine(find_gpu("h100")), 0.4, "bf16")
    vanilla = LoopPlan.empty(made.model.num_layers)

    def flops(step: int) -> int:
        length = made.seq_lengths.at(step)
        return step_flops(at_length(made.model, length), vanilla, made.batches.at(step) * 32 // length).model

    rows = plan["phases"]
    assert [row["flops"] for row in rows] == [
        sum(map(flops, steps)) for steps in (range(1, 11), range(11, 17), range(17, 21))
    ]
    assert [row["tokens"] for row in rows] == [10 * 4 * 32, made.tokens_between(11, 16), 4 * 8 * 32]
    assert plan["run"]["flops"] == sum(row["flops"] for row in rows)
    assert plan["run"]["tokens"] == sum(row["tokens"] for row in rows)
    assert sum(row["days"] for row in rows) == plan["run"]["days"]
    text = render(plan, made, "title").splitlines()
    (head,) = (number for number, line in enumerate(text) if line.startswith("phases "))
    assert [line.split()[0] for line in text[head + 1 : head + 7 : 2]] == ["stable", "long", "phase"]
    assert "batch 4 to 8 · T 16" in text[head + 4] and max(map(len, text)) <= 100


def test_each_phase_has_a_line() -> None:
    lines = phase_lines(config())
    assert lines[0] == "stable: steps 1 to 10 · 1,280 tokens · batch 4 · T 32"
    assert lines[2] == "phase 3: steps 17 to 20 · 1,024 tokens · batch 8 · T 16 · lr linear to 0"
    assert phase_lines(small_config()) == []
