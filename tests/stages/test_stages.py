"""The stages of a configuration: their models and steps, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.config import parse_config
from megatron_sgt.config.lengths import SequenceLengths
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.stages import stage_after, stages_of
from tests.helpers.single import SMALL, small_config

HEADS = {"num_attention_heads": 5, "num_query_groups": 5, "ffn_hidden_size": 128}
MIDAS = {"operator": "midas", "options": {"block_size": 2}}


def staged(*stages: dict[str, Any], **sections: dict[str, Any]) -> Any:
    growth = {"stages": list(stages), "exclude_layers": [0], **sections.pop("growth", {})}
    return small_config(growth=growth, **sections)


def test_one_stage_without_growth() -> None:
    config = small_config()
    (only,) = stages_of(config)
    assert (only.index, only.first, only.last, only.record()) == (0, 0, 10, {})
    assert only.config == config


def test_each_stage_has_its_own_model() -> None:
    config = staged(
        {"until_steps": 3, **MIDAS},
        {"until_tokens": 5 * 64 - 1, "operator": "g_stack", "options": {"factor": 2}, "lr_policy": "rewarm(2)"},
        {"until_steps": 8, "operator": "msg", "options": {"ffn_hidden_size": 128}, "optimizer": "rewind(5)"},
        data={"seq_length_curriculum": [{"until_tokens": 4 * 64, "seq_length": 8}]},
    )
    stages = stages_of(config)
    assert [s.config.seq_lengths for s in stages] == 4 * [SequenceLengths(32, (4,), (8,))], "of the run, not of a stage"
    assert [(s.first, s.last, s.config.model.num_layers) for s in stages] == [
        (0, 3, 4),
        (3, 5, 6),
        (5, 8, 12),
        (8, 10, 12),
    ]
    assert [s.config.model.ffn_hidden_size for s in stages] == [96, 96, 96, 128]
    assert [s.config.growth.exclude_layers for s in stages] == [(0,), (0, 2), (0, 2, 6, 8), (0, 2, 6, 8)]
    assert all(s.config.growth.stages == () and s.config.train == config.train for s in stages)
    assert [stage_after(stages, step).index for step in (0, 2, 3, 4, 5, 9, 10)] == [0, 0, 1, 1, 2, 3, 3]
    assert stages[3].record() == {
        "step": 8,
        "operator": "msg",
        "options": {"ffn_hidden_size": 128},
        "moments": "scaled",
        "optimizer": "rewind(5)",
        "lr_policy": "continue",
        "weights": "weights",
    }


@pytest.mark.parametrize(
    ("stages", "sections", "message"),
    [
        ([{"until_tokens": 11_000_000_000, **MIDAS}], {}, r"stages\[0\]: ends at step 171,875,000, but the run at"),
        ([{"until_steps": 3, "operator": "gstack"}], {}, r"stages\[0\]: operator 'gstack': .* did you mean 'g_stack'"),
        ([{"until_steps": 3, **MIDAS}, {"until_steps": 3, **MIDAS}], {},
         r"stages\[1\]: ends at step 3, which is not after"),
        ([{"until_steps": 10, **MIDAS}], {}, r"stages\[0\]: ends at step 10, but the run at train\.train_iters 10"),
        ([{"until_steps": 3, "operator": "midas"},
          {"until_steps": 4, "operator": "midas", "options": {"block_size": 3}}], {},
         r"stages\[1\]: midas: num_layers 8 is no multiple of block_size 3"),
        ([{"until_steps": 3, "operator": "midas", "options": {"blocksize": 2}}], {},
         r"stages\[0\]: midas: .*blocksize"),
        ([{"until_steps": 3, **MIDAS, "lr_policy": "rewind(3)"}], {}, "must name a step before 3"),
        ([{"until_steps": 6, **MIDAS, "lr_policy": "rewind(1)"}], {"optim": {"lr_decay_iters": 5}},
         r"lr_policy rewind\(1\): the decay has ended at optim\.lr_decay_iters 5, and after step 6"),
        ([{"until_steps": 3, **MIDAS, "lr_policy": "rewarm(8)"}], {},
         r"lr_policy rewarm\(8\): after step 3 the run has 7 steps"),
        ([{"until_steps": 3, "operator": "g_stack", "options": {"factor": 2**31 - 1}}], {},
         r"g_stack: num_layers: must be <= 10000"),
        ([{"until_steps": 3, "operator": "compound_grow", "options": {"noise": 1e30}}], {},
         r"compound_grow: noise: must be <= 1"),
        ([{"until_steps": 3, **MIDAS, "lr_policy": "rewarm"}], {},
         r"lr_policy 'rewarm': must be continue, rewarm\(N\)"),
        ([{"until_steps": 3, **MIDAS, "optimizer": "rewind(0)"}], {}, "optimizer 'rewind"),
        ([{"until_steps": 3, **MIDAS, "optimizer": "fresh"}], {}, "optimizer fresh with moments copy"),
        ([{"until_steps": 3, **MIDAS, "weights": "ema"}], {}, r"no average of the weights; set train\.ema_decay"),
        ([{"until_steps": 3, "operator": "msg", "options": {"ffn_hidden_size": 128}}],
         {"optim": {"adam_beta2": 0.999}}, r"stages\[0\]: optimizer continue with moments scaled"),
        ([{"until_steps": 3, **MIDAS}], {"growth": {"method": "sgt", "replay": "a.jsonl"}},
         r"replay: cannot read a\.jsonl"),
        ([{"until_steps": 3, **MIDAS}],
         {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}},
         r"stages: deepspeed\.zero_optimization\.offload_optimizer\.device is nvme"),
        ([{"until_steps": 3, "operator": "msg", "options": {"num_attention_heads": 8, "num_query_groups": 2}}],
         {"model": {"num_query_groups": 2}, "growth": {"first_selection_step": 3}},
         r"stages\[0\]: heads .* would get other numbers"),
        ([{"until_steps": 3, "operator": "msg", "options": HEADS}],
         {"parallel": {"tensor_model_parallel_size": 2}}, r"stages\[0\]: the grown model: .*num_attention_heads: 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(stages: list[Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"growth.*{message}"):
        stages_of(staged(*stages, **sections))


@pytest.mark.parametrize("until", [{}, {"until_steps": 3, "until_tokens": 500}])
def test_a_stage_has_one_end(until: dict[str, int]) -> None:
    values = {**SMALL, "growth": {"stages": [{**until, **MIDAS}]}}
    with pytest.raises(ConfigError, match=r"growth\.stages\[0\]\.until_steps: give it or until_tokens, and not both"):
        parse_config(values, source="a test")
