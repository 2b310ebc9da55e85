"""Training under the mask: as plain PyTorch does, the same under every layout, and across an interruption."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS, WEIGHTS
from megatron_sgt.checkpoint.surgery.offline import grow_checkpoint
from megatron_sgt.checkpoint.surgery.reader import GrownReader, open_any
from megatron_sgt.config import Config, load_config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.hooks.ramp import RampHook
from megatron_sgt.engine.step import TrainState, train_step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.ramp import RampMask
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.optimizer import OptimizerPolicy, carry
from tests.helpers.deepspeed_files import STEP, State, odd_config, random_state, write_checkpoint
from tests.helpers.growing import logits
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data
from tests.helpers.single import random_batch
from tests.helpers.variants import hf_of

LR, SEED, OLD, RAMP, STEPS, SKIPPED = 1e-3, 11, 20, 3, 6, 2
ALONE = {"micro_batch_size": 1, "global_batch_size": 4}
OPTIONS = {"ffn_hidden_size": 28, "num_layers": 3, "ramp_steps": RAMP}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "one rank, accumulation 1": {"micro": 4},
    "tensor parallel": {
        "ranks": 2, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    },
    "tensor parallel, recomputed": {
        "ranks": 2, "parallel": {"tensor_model_parallel_size": 2, "zero_stage": 2},
        "train": {"recompute_granularity": "full"}, "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "zero 3": {"ranks": 2, "parallel": {"zero_stage": 3},
               "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
}  # fmt: skip
"""Layouts with four sequences a step, of which ``micro`` (1) make a micro-batch: one rank accumulates four."""


def small_state() -> State:
    state = random_state(odd_config())
    state[WEIGHTS] = {name: 0.3 * tensor for name, tensor in state[WEIGHTS].items()}
    state["exp_avg_sq"] = {name: 1e-4 + (0.02 * tensor) ** 2 for name, tensor in state["exp_avg_sq"].items()}
    state["exp_avg"] = {name: 0.005 * tensor for name, tensor in state["exp_avg"].items()}
    return state


def grown_by(source: Path, where: dict[str, Any]) -> tuple[Config, GrownReader, int]:
    """The configuration after growth under a layout, its tensors, AdamW's step."""
    train = {"micro_batch_size": where.get("micro", 1), "global_batch_size": 4, **where.get("train", {})}
    sections = {name: where[name] for name in ("parallel", "deepspeed") if name in where}
    old = odd_config({"train": train, "optim": {"lr": LR, "weight_decay": 0.0}, **sections})
    growth, opened = OPERATORS["msg"](old.model, OPTIONS), open_any(source)
    config = grown_config(old, growth, opened.step)
    carried = carry(opened.step, OptimizerPolicy.parse("continue"), "scaled", config.optim, True)
    return config, GrownReader(opened.tensors, growth, carried, SEED, stage=1), carried.step


def on_ranks(info: RankInfo, source: Path, where: dict[str, Any]) -> dict[str, Any]:
    """(mean loss, gradient norm) of the steps, one of which is skipped; weights after them, on one rank."""
    config, reader, step = grown_by(source, where)
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    engine, state = runtime.engine, TrainState(STEP)
    load_into_engine(reader, step, None, config, engine, groups)
    assert config.growth.ramp is not None
    hook = RampHook(config.growth.ramp, RampMask(runtime.model, config, groups))
    hook.before_run(state)
    engine.train()
    found: dict[str, Any] = {"steps": [], "weights": []}
    for number in range(STEPS):
        size, count = config.train.micro_batch_size, config.num_micro_batches(groups.world_size)
        rows = [random_batch(odd_config({"train": ALONE}), 100 * number + index) for index in range(4)]
        mine = rows[groups.dp_rank * count * size :]
        batches = [
            {name: torch.cat([row[name] for row in mine[size * index : size * index + size]]) for name in rows[0]}
            for index in range(count)
        ]
        if number == SKIPPED:
            batches[0]["loss_mask"][0, 3] = math.nan
        result = train_step(engine, batches, LR, config.optim.clip_grad, groups)
        assert result.applied is (number != SKIPPED)
        state.step += result.applied
        hook.after_step(state, result)
        found["steps"].append((float(result.loss), result.grad_norm))
        if info.world_size == 1:
            found["weights"].append({n: t.clone() for n, t in hf_of(runtime.model, config).items()})
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), odd_config(), small_state(), (1, 1, 0))


@cache
def trained(source: Path, name: str) -> list[dict[str, Any]]:
    return run_on_ranks(LAYOUTS[name].get("ranks", 1), on_ranks, source, LAYOUTS[name])


def mean_steps(source: Path, name: str) -> list[tuple[float, float]]:
    """Loss of the whole batch and gradient norm of every applied step."""
    ranks = [rank["steps"] for rank in trained(source, name)]
    steps = [(sum(rank[n][0] for rank in ranks) / len(ranks), ranks[0][n][1]) for n in range(STEPS) if n != SKIPPED]
    assert math.isnan(sum(rank[SKIPPED][0] for rank in ranks))
    return steps


def by_reference(source: Path, skips_advance: bool = False) -> list[tuple[float, float]]:
    """The same steps in plain PyTorch, the mask written out: new gate rows, and what the new layer writes, times m."""
    config, reader, step = grown_by(source, {})
    state = {
        q: {n: t for one in reader.parameters() for n, t in reader.whole(one, q).items()} for q in reader.quantities
    }
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state[WEIGHTS].items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for name, leaf in leaves.items():
        optimizer.state[leaf] = {"step": torch.tensor(float(step)), **{m: state[m][name].clone() for m in MOMENTS}}
    found, applied = [], 0
    for number in range(STEPS):
        if number == SKIPPED:
            applied += skips_advance
            continue
        mask = min(1.0, applied / RAMP)
        rows = torch.cat([torch.ones(OLD, 1), torch.full((28 - OLD, 1), mask)])
        factors = {name: rows if "gate_proj" in name else 1.0 for name in leaves}
        factors |= {f"model.layers.2.{name}.weight": mask for name in ("self_attn.o_proj", "mlp.down_proj")}
        losses = []
        for index in range(4):
            batch = random_batch(odd_config({"train": ALONE}), 100 * number + index)
            scores = logits({n: leaf * factors[n] for n, leaf in leaves.items()}, config.model, batch["tokens"])
            losses.append(torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten()))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
        applied += 1
        found.append((float(loss.detach()), float(norm)))
    return found


def test_steps_are_those_of_plain_pytorch(source: Path) -> None:
    found = mean_steps(source, "one rank")
    for (loss, norm), (expected, expected_norm) in zip(found, by_reference(source), strict=True):
        assert loss == pytest.approx(expected, abs=3e-5) and norm == pytest.approx(expected_norm, rel=1e-5)
    # Control: a mask that a skipped step advances makes another run.
    other = by_reference(source, skips_advance=True)
    assert max(abs(one[1] / two[1] - 1) for one, two in zip(found, other, strict=True)) > 1e-3


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_every_layout_takes_the_same_steps(name: str, source: Path) -> None:
    one, other = mean_steps(source, "one rank"), mean_steps(source, name)
    for (loss, norm), (found, found_norm) in zip(one, other, strict=True):
        assert found == pytest.approx(loss, abs=1e-5) and found_norm == pytest.approx(norm, rel=1e-6)


def test_every_new_weight_learns_once_there_is_a_mask(source: Path) -> None:
    """The first step, at mask 0, leaves new units as they are; no weight decay is at work here."""
    _, reader, _ = grown_by(source, {})
    start = {n: t for one in reader.parameters() for n, t in reader.whole(one, WEIGHTS).items()}
    after = trained(source, "one rank")[0]["weights"]
    third = after[3]  # of four steps, of which one was skipped
    for layer in range(3):
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = f"model.layers.{layer}.mlp.{name}.weight"
            old, first, now = (t[full].T if name == "down_proj" else t[full] for t in (start, after[0], third))
            assert torch.equal(first[OLD:], old[OLD:]), full
            assert bool((now[OLD:] != old[OLD:]).all()), full
    for name in [n for n in start if n.startswith("model.layers.2.")]:
        assert bool((third[name] != start[name]).all()), name


def test_an_interruption_inside_the_ramp_changes_no_bit(tmp_path: Path) -> None:
    """The next ten losses, norms and all else that a step measures; the same from a checkpoint grown by the tool."""
    data, options = write_tiny_data(tmp_path), {"ffn_hidden_size": 64, "num_layers": 6, "ramp_steps": 8}

    def run(name: str, end: int | None, ramp_steps: int = 8, **growth: Any) -> None:
        stage = {"until_steps": 2, "operator": "msg", "options": {**options, "ramp_steps": ramp_steps}}
        train = {"train_iters": 15, "exit_interval": end, "eval_interval": 0}
        config = tiny_config(tmp_path / name, data, train=train, growth={"stages": [stage], **growth})
        run_on_ranks(1, pretrain, config)

    run("whole", None)
    run("parts", 5)
    run("parts", None)
    run("short", 4, ramp_steps=1)
    run("old", 2, stages=[])
    made = grow_checkpoint(tmp_path / "old/checkpoints", tmp_path / "tool", OPERATORS["msg"], options)
    run_on_ranks(1, pretrain, load_config(made.config_file, ["train.exit_interval=6"]))
    whole, parts, short = (measured_steps(tmp_path / name) for name in ("whole", "parts", "short"))
    assert [step["step"] for step in parts] == list(range(1, 16))
    assert parts == whole
    assert measured_steps(tmp_path / "tool/run") == whole[2:6]
    assert short[2] == whole[2] and short[3]["loss"] != whole[3]["loss"], "the first step is at mask 0, the next is not"
    (grow,) = reported(tmp_path / "whole", "grow")
    assert grow["probe_loss_after"] == pytest.approx(grow["probe_loss_before"], abs=1e-6)
