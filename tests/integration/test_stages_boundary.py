"""What a boundary does to a running job: every new weight, memory, FLOPs, and the model that is exported."""

from __future__ import annotations

import ctypes
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.surgery.reader import GrownReader, open_any
from megatron_sgt.config import Config
from megatron_sgt.engine import loop
from megatron_sgt.export.checked import checked_export
from megatron_sgt.export.to_hf import ExportOptions
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.stages.optimizer import Carried
from megatron_sgt.stages.stages import stages_of
from tests.helpers import staged
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference_growth import Params
from tests.helpers.runs import pretrain, reported, write_tiny_data
from tests.helpers.staged import FIRST, LAST, SECOND, samples, staged_config

M_MMAP_THRESHOLD = -3
"""Of the C library's malloc.h."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boundaries")


@cache
def data(folder: Path) -> str:
    return write_tiny_data(folder)


@cache
def run(folder: Path, method: str) -> tuple[Path, Config]:
    """The directory of a run of three stages that saves every step."""
    config = staged_config(folder / method, data(folder), method, checkpoint={"save_interval": 1, "keep_last": 0})
    run_on_ranks(1, pretrain, config)
    return folder / method, config


def whole(run_dir: Path, step: int, quantity: str = WEIGHTS) -> Params:
    """All tensors of a checkpoint."""
    opened = open_any(run_dir / f"checkpoints/global_step{step}")
    table = weights(opened.config.model)
    return {n: t.clone() for weight in table for n, t in opened.tensors.whole(weight, quantity).items()}


def grown(run_dir: Path, config: Config, step: int) -> Params:
    """The weights with which the stage after ``step`` begins."""
    stage = next(stage for stage in stages_of(config) if stage.first == step)
    assert stage.grown is not None
    opened = open_any(run_dir / f"checkpoints/global_step{step}")
    reader = GrownReader(opened.tensors, stage.grown.growth, Carried(0, "fresh"), config.train.seed, stage.index)
    return {n: t.clone() for weight in reader.parameters() for n, t in reader.whole(weight, WEIGHTS).items()}


@pytest.mark.parametrize("method", ["g_stack", "msg_all", "compound_grow_noise"])
def test_every_weight_of_a_grown_model_trains(method: str, folder: Path) -> None:
    run_dir, config = run(folder, method)
    tokens = samples(config)[0]
    for step in (FIRST, SECOND):
        start, one, three = grown(run_dir, config, step), whole(run_dir, step + 1), whole(run_dir, step + 3)
        assert start.keys() == three.keys()
        seen = tokens[step : step + 3].unique()
        for name, tensor in start.items():
            assert bool((one[name] != tensor).any()), f"{name}: no update in the first step"
            rows = seen if "embed_tokens" in name else slice(None)
            still = three[name][rows] == tensor[rows]
            assert not still.any(), f"{name}: {int(still.sum())} of {still.numel()} entries after three steps"


def test_a_step_costs_what_the_blocks_of_its_stage_cost(folder: Path) -> None:
    """k T / sum of i T_i, of the blocks alone, for k stages of T_i steps with i blocks."""
    run_on_ranks(1, pretrain, staged_config(folder / "flops", data(folder), "midas"))
    steps = [r for r in read_metrics(folder / "flops" / METRICS_FILE) if r["kind"] == "train"]
    flops = [step["model_flops_per_step"] for step in steps]
    stages = flops[:FIRST], flops[FIRST:SECOND], flops[SECOND:]
    assert all(len(set(stage)) == 1 for stage in stages)
    block = stages[1][0] - stages[0][0]
    outside = stages[0][0] - 2 * block
    assert stages[2][0] - stages[1][0] == block > 0 and outside > 0
    blocks = sum(one - outside for one in flops) / block
    assert blocks == pytest.approx(FIRST * 2 + (SECOND - FIRST) * 3 + (LAST - SECOND) * 4)
    for record, (before, after) in zip(reported(folder / "flops", "grow"), ((0, 1), (1, 2)), strict=True):
        tokens = 4 * staged.MODEL["seq_length"]
        assert record["flops_per_token_before"] * tokens == pytest.approx(stages[before][0])
        assert record["flops_per_token_after"] * tokens == pytest.approx(stages[after][0])


def test_the_average_grows_as_the_weights_do(folder: Path) -> None:
    """An average that is as good as the weights grows into what the weights grow into (MoGrow is interpolation)."""
    sections = {"train": {"ema_decay": 1e-9, "exit_interval": FIRST + 1}, "optim": {"lr": 1e-30, "min_lr": 0.0}}
    config = staged_config(folder / "mogrow", data(folder), "auto_prog_ema", **sections)
    run_on_ranks(1, pretrain, config)
    before = whole(folder / "mogrow", FIRST)
    after, average = (whole(folder / "mogrow", FIRST + 1, quantity) for quantity in (WEIGHTS, AVERAGE))
    for name, tensor in after.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        source = before[name.replace(f".{layer}.", f".{[0, 1, 1][layer]}.", 1)] if layer else before[name]
        assert torch.allclose(tensor, source, rtol=1e-6) and torch.allclose(average[name], source, rtol=1e-6)


def anonymous() -> int:
    """Bytes of this process's memory that is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def memory_of_the_boundary(info: RankInfo, config: Config) -> tuple[int, int, int]:
    """Anonymous memory when the surgery begins, its peak until the first step after it, and then."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed is gone at once
    seen: list[int] = []
    began, done = threading.Event(), threading.Event()
    read, step = GrownReader.whole, loop.train_step

    def reading(self: GrownReader, *args: Any) -> Any:
        if not began.is_set():
            seen.append(anonymous())
            began.set()
        return read(self, *args)

    def stepping(*args: Any) -> Any:
        if began.is_set() and not done.is_set():
            done.set()
            watching.join()
            seen.append(anonymous())
        return step(*args)

    def watch() -> None:
        began.wait()
        peak = 0
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)
        seen.append(peak)

    GrownReader.whole, loop.train_step = reading, stepping  # type: ignore[method-assign,assignment]
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    pretrain(info, config)
    before, peak, after = seen
    return before, peak, after


@pytest.mark.parametrize("zero", share_of((0, 1, 3), [3]))
def test_the_surgery_needs_memory_for_one_tensor(zero: int, folder: Path, tmp_path: Path) -> None:
    model = {"hidden_size": 192, "num_attention_heads": 4, "kv_channels": 48, "vocab_size": 16000, "num_layers": 1}
    stage = {"until_steps": 1, "operator": "msg", "options": {"hidden_size": 256}, "moments": "seeded"}
    config = staged_config(
        tmp_path,
        data(folder),
        "msg_hidden",
        model=model,
        growth={"stages": [stage]},
        train={"train_iters": 2},
        parallel={"zero_stage": zero, "device": "cpu"},
        deepspeed={"zero_optimization": {"stage": zero}} if zero else {},
    )
    ((before, peak, after),) = run_on_ranks(1, memory_of_the_boundary, config)
    largest = len(QUANTITIES) * 4 * 16000 * 256
    print(f"zero {zero}: {before / 1e6:.0f} MB, at most {peak / 1e6:.0f}, then {after / 1e6:.0f}; {largest / 1e6:.0f}")
    assert 0.2 * largest < peak - max(before, after) <= 1.2 * largest


@pytest.mark.parametrize(
    ("sizes", "architecture", "why"),
    [
        ({"hidden_size": 32, "num_attention_heads": 8, "ffn_hidden_size": 28}, "LlamaForCausalLM", ""),
        ({"hidden_size": 26}, "SGTForCausalLM", "heads to divide hidden_size 26"),
    ],
)
def test_a_grown_model_leaves(sizes: dict[str, int], architecture: str, why: str, folder: Path, tmp_path: Path) -> None:
    stages = [
        {"until_steps": 1, "operator": "msg", "options": sizes},
        {"until_steps": 2, "operator": "g_stack", "options": {"factor": 2}},
    ]
    settings = {"growth": {"stages": stages}, "train": {"train_iters": 3, "micro_batch_size": 2}}
    config = staged_config(
        tmp_path / "run", data(folder), "g_stack", **settings, parallel={"tensor_model_parallel_size": 2}
    )
    run_on_ranks(2, pretrain, config)
    options = ExportOptions(dtype="fp32", write_tokenizer=False)
    export, parity = checked_export(config.save_dir, tmp_path / "hf", options=options)
    assert export.architecture == architecture and why in export.why
    assert parity is not None and parity.passed, parity
