"""A plan as text: its width, its rows, its verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import load_config
from megatron_sgt.planning.hardware import find_gpu
from megatron_sgt.planning.plan import ERROR_BARS, make_plan
from megatron_sgt.planning.render import WIDTH, render
from megatron_sgt.planning.step_time import Machine

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


def text_of(name: str, ranks: int, gpu: str = "h100", *overrides: str) -> str:
    config = load_config(EXAMPLES / f"{name}.yaml", ["model.vocab_size=32000", *overrides])
    return render(make_plan(config, ranks, Machine(find_gpu(gpu)), 0.4, "bf16"), config, f"plan of {name}")


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("sgt_70b", 4096),
        ("sgt_70b", 8),
        ("vanilla_300m", 1),
        ("block_loop_300m", 8),
        ("sgt_300m_lowest_heads", 128),
    ],
)
def test_no_line_is_wider_than_a_hundred_columns(name: str, ranks: int) -> None:
    text = text_of(name, ranks)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(not line.endswith(" ") for line in text.splitlines())


def test_the_rows_of_a_grown_run() -> None:
    text = " ".join(text_of("sgt_7b", 32).split())
    for part in (
        "6,738,415,616 parameters · 32 layers",
        "embedding 131 M · attention 2.15 B · mlp 4.33 B",
        "32 ranks = tensor parallel 2 x data parallel 16 · ZeRO-1 · bf16",
        "1024 sequences = micro 1 x accumulation 64 x data parallel 16 · 4,194,304 tokens per step",
        "now in a window after growth",
        "vanilla 1 .. 1,000 0 46.1 G +0.00 %",
        "fixed 4,001 .. 32,000 3",
        "naive (at the owner)",
        "at 40 % MFU (assumed; --mfu)",
        "step model not calibrated: ",
        "warnings none",
        *ERROR_BARS,
    ):
        assert part in text, part
    assert "of the usable 73.6 GB: fits" in text


def test_an_average_of_the_weights_has_a_row_where_there_is_one() -> None:
    on, off = (text_of("sgt_7b", 32, "h100", *overrides) for overrides in (["train.ema_decay=0.999"], []))
    assert "  average of the weights " in on and "average of the weights" not in off


def test_a_curriculum_of_lengths_is_told_and_divides_the_table() -> None:
    curriculum = "data.seq_length_curriculum=[{until_steps: 500, seq_length: 1024}]"
    lines = text_of("sgt_7b", 32, "h100", curriculum).splitlines()
    assert "lengths     1,024 until step 500, then 4,096" in lines
    assert [line[:22].strip() for line in lines if line.startswith("  vanilla")] == [
        "vanilla, T 1,024",
        "vanilla, T 4,096",
    ]
    assert any("s per step at T 4,096 (" in line for line in lines) and max(map(len, lines)) <= WIDTH


def test_documents_have_a_row_where_they_matter() -> None:
    mask = "data.reset_attention_mask=true"
    assert "documents" not in text_of("sgt_7b", 32)
    text = text_of("sgt_7b", 32, "h100", mask)
    assert "documents   no token attends to another document; FLOPs and times assume one per sequence" in text
    config = load_config(EXAMPLES / "sgt_7b.yaml", ["model.vocab_size=32000", mask])
    pairs = AttendedPairs(((4096, 4 * 1024 * 1025 / 2),), padding=0.012)
    text = render(make_plan(config, 32, Machine(find_gpu("h100")), 0.4, "bf16", pairs), config, "plan")
    said = "attention has 25 % of the work of whole sequences (measured) · 1.2 % of the tokens are padding"
    assert said in " ".join(text.split())


def test_what_does_not_fit_says_so_in_the_bar_and_in_a_warning() -> None:
    text = text_of("sgt_13b", 8, "a100-40gb")
    assert "[########################################]" in text
    assert "DOES NOT FIT" in text
    assert "warnings    1  does not fit" in text


def test_one_rank_sends_nothing_and_vanilla_has_one_moment() -> None:
    text = text_of("vanilla_300m", 1, "h200")
    assert "none: one rank" in text
    assert "in a window" not in text and "after growth" not in text


def test_a_pipeline_shows_its_cut_and_its_bubble() -> None:
    more = ["parallel.pipeline_model_parallel_size=4", "train.micro_batch_size=1", "train.global_batch_size=32"]
    text = " ".join(text_of("sgt_1.2b", 8, "h100", *more).split())
    for part in (
        "tensor parallel 1 x pipeline parallel 4 x data parallel 2",
        "6,6,7,5 layers · largest stage over the mean +11.6 % now, +10.9 % after growth",
        "(even cut: +13.0 % now, +14.9 % after growth) · bubble of equal stages 15.8 % of a step (16 micro-batches)",
        "growth lengthens a step by 0.13 % (even cut: 2.01 %)",
        ", between stages 0.0018",
    ):
        assert part in text, part
    assert "bubble" not in text_of("sgt_1.2b", 8)
