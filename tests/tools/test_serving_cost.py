"""The cost of loops per token: the formulas of docs/serving.md, and its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from serving_cost import FORMS, costs
from torch.utils.flop_counter import FlopCounterMode

from tests.docs.shell_blocks import ROOT
from tests.helpers.commands import run_script
from tests.helpers.hf_models import VARIANTS, hf_config, hf_model, random_ids

PAGE = ROOT / "docs" / "serving.md"


def test_the_page_has_what_the_tool_prints(tmp_path: Path) -> None:
    text = PAGE.read_text("utf-8")
    (config,) = re.findall(r"config.json <<'END'\n(.*?)END", text, re.DOTALL)
    (tmp_path / "config.json").write_text(config)
    done = run_script("tools/bench/serving_cost.py", [str(tmp_path)], tmp_path)
    assert done.code == 0, done.err
    assert f"```text\n{done.out}```" in text


@pytest.mark.parametrize("form", FORMS)
def test_formulas(form: str) -> None:
    # 8 heads of 6 in 4 groups. Heads 2 and 5 are in groups 1 and 2; heads 0 and 1 in one.
    loops = {"1": {"heads": [2, 5], "depth": 2}, "3": {"heads": [0, 1], "depth": 1}}
    config = hf_config("multi_head", num_attention_heads=8, num_key_value_heads=4, head_dim=6, sgt_loops=loops)
    base, found = (costs(config, 100, 2)[name] for name in ("without loops", form))
    d, h, n, g = config.hidden_size, 6, 8, 4
    every = (4 * d * h * (n + g) + 400 * h * n, 4 * h * g)
    one = {
        "without loops": ((0, 0), (0, 0)),
        "all heads": (every, every),
        "kept groups": (
            (4 * d * h * (n + g) + 400 * h * 4, 4 * h * 2),
            (4 * d * h * (n + g) + 400 * h * 2, 4 * h * 1),
        ),
        "kept heads": ((4 * d * h * 4 + 400 * h * 2, 4 * h * 2), (4 * d * h * 3 + 400 * h * 2, 4 * h * 1)),
    }[form]
    assert found == tuple(base[k] + 2 * one[0][k] + one[1][k] for k in (0, 1))
    mlp = 6 * d * config.intermediate_size
    assert base == (4 * (every[0] + mlp) + 2 * d * config.vocab_size, 4 * every[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_standard_form_computes_what_is_said(name: str) -> None:
    model = hf_model(name)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(random_ids(1, 1), use_cache=False)
    assert counted.get_total_flops() == costs(model.config, 1, 2)["kept heads"][0]


def test_a_window_and_block_loops_cost_whole_layers() -> None:
    window = costs(hf_config("window"), 64, 2)
    assert window["kept heads"] == window["all heads"]
    blocks, vanilla = costs(hf_config("block_loop"), 64, 2), costs(hf_config("never_grown"), 64, 2)
    assert blocks["all heads"][1] * 4 == vanilla["all heads"][1] * 7


def test_no_export_is_one_line_and_exit_code_4(tmp_path: Path) -> None:
    done = run_script("tools/bench/serving_cost.py", [str(tmp_path)], tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
