"""The exported model is the one that was trained: against the ranks' own logits, loss and greedy text.

`make test` takes a share of the matrix; `make test-all` every tensor-parallel size with every ZeRO stage, and 256
tokens of text in each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.export.checked import checked_export
from megatron_sgt.export.hf.loading import load_exported
from megatron_sgt.export.parity import loss_of
from megatron_sgt.export.to_hf import ExportOptions
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import VOCAB_SIZE, tiny_config, write_tiny_data
from tests.helpers.trained import Told, train_and_tell

Layout = tuple[int, int, int]
"""Tensor-parallel size, data-parallel size, ZeRO stage."""

VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_query_groups": 2},
    "qk_norm": {"qk_layernorm": True},
    "tied": {"untie_embeddings_and_output_weights": False, "kv_channels": 12},
    "biases": {"add_bias_linear": True},
    "qkv_bias": {"add_qkv_bias": True, "num_query_groups": 2},
}
SHARE: list[tuple[str, int, Layout]] = [
    ("multi_head", 1, (1, 1, 0)),
    ("grouped_query", 2, (2, 1, 1)),
    ("qk_norm", 3, (2, 1, 3)),
    ("tied", 2, (1, 2, 2)),
    ("biases", 3, (2, 1, 0)),
    ("qkv_bias", 1, (1, 2, 3)),
]
FITTING = {1: list(VARIANTS), 2: list(VARIANTS), 4: ["multi_head", "qk_norm", "tied", "biases"]}
EVERY: list[tuple[str, int, Layout]] = [
    (FITTING[tp][(stage + tp) % len(FITTING[tp])], 1 + (stage + tp) % 3, (tp, 1 if tp == 4 else 2, stage))
    for tp in (1, 2, 4)
    for stage in range(4)
]
LONG, SHORT = 256, 24
"""New tokens."""
CASES = [(*case, LONG if case[2] == (1, 1, 0) else SHORT) for case in SHARE]
MORE: list[tuple[str, int, Layout]] = [
    ("grouped_query", 2, (2, 1, 1)), ("qk_norm", 2, (4, 1, 1)), ("qk_norm", 3, (4, 1, 3)),
]  # fmt: skip
CASES += [exhaustive((*case, LONG)) for case in (*EVERY, *MORE)]
GREEDY = {"do_sample": False, "num_beams": 1}


def told_by_ranks(tmp_path: Path, variant: str, depth: int, where: Layout, new_tokens: int) -> Told:
    tp, dp, stage = where
    config = tiny_config(
        tmp_path / "run",
        write_tiny_data(tmp_path),
        model={**VARIANTS[variant], "seq_length": 32},
        growth={
            "first_selection_step": 1,
            "window_size": 1,
            "max_selected_layers": 2,
            "max_loop_depth": depth,
        },
        parallel={"tensor_model_parallel_size": tp, "zero_stage": stage, "sequence_parallel": tp == 2},
        train={"train_iters": 12, "eval_interval": 0},
        # Without it, ZeRO 3 keeps weights as small as these whole on every rank.
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    return run_on_ranks(tp * dp, train_and_tell, config, ids(2, 32), ids(2, 8), new_tokens, timeout=300)[0]


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(shape[1]))


@pytest.mark.parametrize(("variant", "depth", "where", "new_tokens"), CASES)
def test_the_export_is_the_trained_model(
    tmp_path: Path, variant: str, depth: int, where: Layout, new_tokens: int
) -> None:
    told = told_by_ranks(tmp_path, variant, depth, where, new_tokens)
    assert max(told.loop_depth) == depth, "the run must have grown as deep as it may"
    export, parity = checked_export(
        tmp_path / "run" / "checkpoints", tmp_path / "hf", options=ExportOptions(dtype="fp32")
    )
    assert parity is not None and parity.passed
    model = load_exported(export.folder, torch.float32, trust=True)
    probe, prompts = ids(2, 32), ids(2, 8)
    with torch.no_grad():
        logits = model(probe, use_cache=False).logits
        cached = model.generate(prompts, **GREEDY, max_new_tokens=new_tokens)[:, 8:]
        uncached = model.generate(prompts, **GREEDY, max_new_tokens=min(new_tokens, 64), use_cache=False)[:, 8:]
    gap = float((logits - told.logits).abs().max())
    print(f"logits {gap:.1e}, loss {abs(loss_of(logits, probe) - told.loss):.1e}")
    assert gap <= 1e-4
    assert abs(loss_of(logits, probe) - told.loss) <= 1e-5
    assert torch.equal(cached, told.greedy)
    assert torch.equal(uncached, told.greedy[:, : uncached.shape[1]])


def test_the_matrix_is_whole() -> None:
    """Every variant and depth, every tensor-parallel size, every stage; and all pairs of the latter two."""
    assert {case[0] for case in SHARE} == set(VARIANTS) and {case[1] for case in SHARE} == {1, 2, 3}
    assert {case[2][0] for case in SHARE} == {1, 2} and {case[2][2] for case in SHARE} == {0, 1, 2, 3}
    assert {(case[2][0], case[2][2]) for case in EVERY} == {(t, s) for t in (1, 2, 4) for s in range(4)}
    assert {case[0] for case in EVERY} == set(VARIANTS)
