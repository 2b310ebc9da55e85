"""Which layers each stage of a pipeline holds, and the notations for it."""

from typing import Any

import pytest

from megatron_sgt.config.pipeline import LayoutSetting, PipelineLayout, even_layout, parse_layout, read_layout
from megatron_sgt.errors import ConfigError
from tests.helpers.single import small_config


@pytest.mark.parametrize(
    "setting",
    [
        "Et*3|tt|(t)*2|tL",
        "E ttt | tt | tt | tL",
        "3,2,2,1",
        (3, 2, 2, 1),
        (("embedding", *["decoder"] * 3), *[("decoder", "decoder")] * 2, ("decoder", "loss")),
    ],
)
def test_notations(setting: LayoutSetting) -> None:
    layout = parse_layout(setting, 4, 1, 8)
    assert layout == PipelineLayout(4, (3, 2, 2, 1))
    assert parse_layout(str(layout), 4, 1, 8) == layout
    assert parse_layout(tuple(map(tuple, layout.megatron())), 4, 1, 8) == layout


def test_chunks_follow_megatrons_order() -> None:
    layout = PipelineLayout(2, (1, 2, 3, 1))
    assert layout.virtual_size == 2 and layout.num_layers == 7
    assert layout.chunks(0) == (range(1), range(3, 6)) and layout.layers(1) == (1, 2, 6)
    assert [layout.stage_of(layer) for layer in range(7)] == [0, 1, 1, 0, 0, 0, 1]
    assert even_layout(2, 2, 7).counts == (2, 2, 2, 1)


def test_megatron_reads_the_same() -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text = "Et|tt*2|(t)*2|t|t|tL"
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text, 3, 2, 9).megatron() == [[kind.name for kind in row] for row in theirs]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("Et|t", "begin with the embedding"),
        ("tE|t|t|tL", "begin with the embedding"),
        ("Et|x|t|tL", "'x' is none of E"),
        ("Et|t|t|tmL", "'m' is none of E"),
        ("Et|t|tL", "3 parts for 4 stages"),
        ("E|tt|tt|tL", "part 0 has no layer"),
        ("3,2,2,2", r"3 \+ 2 \+ 2 \+ 2 = 9 layers, the model 8"),
        ((8,), "1 parts for 4 stages"),
        ("t*99999|", "repeats something 99999 times"),
        ("E(t*9999)*9999|tL", "longer than 100,000 with its repetitions"),
        ("(((t)*9999)*9999)*9999", "longer than 100,000 with its repetitions"),
        ("E" + "t" * 100_000, "longer than 100,000"),
        ("１,７", "'１' is none of E"),
        ((("embedding", "attention"), ("loss",)), "'attention' is none of"),
    ],
)
def test_what_does_not_add_up(setting: LayoutSetting, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_layout(setting, 4, 1, 8)


@pytest.mark.parametrize("value", [True, 3.5, 3, None, {}, {"a": 1}, [], [1, "a"], ["E", "t"], [True, 3], [3.0], [[1]]])
def test_what_is_no_notation(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be auto, .*, got "):
        read_layout(value)


def test_nearest_batches_of_an_interleaved_pipeline_have_a_multiple_of_its_stages() -> None:
    sections: dict[str, Any] = {
        "model": {"num_layers": 8},
        "parallel": {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
    }
    wrong, right = (
        small_config(**sections, train={"micro_batch_size": 2, "global_batch_size": size}) for size in (22, 16)
    )
    with pytest.raises(ConfigError, match=r"work: 16 \(accumulation 4\), 32 \(accumulation 8\)$"):
        wrong.num_micro_batches(8)
    assert right.num_micro_batches(8) == 4
