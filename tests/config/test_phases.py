"""The phases of a run: their ends, what holds in each, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.lengths import SequenceLengths
from megatron_sgt.config.phases import phases_of, phases_text
from megatron_sgt.errors import ConfigError

SHAPE = {"num_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "vocab_size": 64}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
THREE: list[dict[str, Any]] = [
    {"until_steps": 6, "name": "stable", "seq_length": 16},
    {"until_tokens": 32 * 200, "global_batch_size": [8, 24], "seq_length": 32, "rotary_base": 5e5},
    {"name": "anneal", "lr_decay_style": "linear", "min_lr": 0.0, "data_path": "30% a 70% b", "rotary_scaling": YARN},
]


def config(*phases: dict[str, Any], **sections: dict[str, Any]) -> Config:
    given = {
        "model": {**SHAPE, "seq_length": 32},
        "optim": {"lr": 1e-3},
        "train": {"train_iters": 20, "micro_batch_size": 2, "global_batch_size": 8},
        "data": {"data_path": ["c"]},
    }
    merged = {name: {**given.get(name, {}), **sections.get(name, {})} for name in {*given, *sections}}
    return parse_config({**merged, "phases": list(phases)})


def test_what_a_phase_does_not_set_stays_as_before() -> None:
    stable, middle, anneal = phases_of(config(*THREE))
    assert [(p.name, p.first, p.last) for p in (stable, middle, anneal)] == [
        ("stable", 1, 6),
        ("phase 2", 7, 15),
        ("anneal", 16, 20),
    ]
    assert [(span.first, span.last, span.size) for span in middle.spans] == [(7, 7, 8), (8, 12, 16), (13, 15, 24)]
    assert [span.size for span in anneal.spans] == [24], "where the ramp has ended"
    assert [p.rotary_base for p in (stable, middle, anneal)] == [1e4, 5e5, 5e5]
    assert [p.data_path for p in (stable, middle, anneal)] == [("c",), ("c",), ("0.3", "a", "0.7", "b")]
    assert (middle.rotary_scaling, anneal.rotary_scaling and anneal.rotary_scaling.factor) == (None, 4.0)


def test_a_ramp_hands_on_its_last_size() -> None:
    """Also where its last step has less."""
    ramp, after = phases_of(config({"until_steps": 10, "global_batch_size": [2, 198]}, {}))
    assert (ramp.spans[-1].size, after.spans[0].size) == (194, 198)
    made = config({"until_steps": 2, "global_batch_size": [4, 14]}, {"global_batch_size": 8})
    assert [span.size for span in phases_of(made)[0].spans] == [4, 12]
    with pytest.raises(ConfigError, match=r"^phases\[0\]: batch sizes do not multiply: global_batch_size 14 != micro"):
        made.num_micro_batches(2)


def test_steps_samples_and_tokens() -> None:
    made = config(*THREE)
    sizes = [8] * 7 + [16] * 5 + [24] * 8
    assert [made.batches.at(step) for step in range(1, 21)] == sizes
    assert made.tokens_between(7, 13) == 32 * sum(sizes[6:13])
    assert made.tokens_between(1, 15) >= 32 * 200 > made.tokens_between(1, 14)
    assert made.seq_lengths == SequenceLengths(32, ends=(6,), shorter=(16,))
    assert [step for step in range(1, 30) if made.phase_begins_at(step)] == [7, 16]
    assert [made.at_step(step).model.rotary_base for step in (0, 6, 7, 99)] == [1e4, 1e4, 5e5, 5e5]
    assert parse_config(made.model_dump()) == made


def test_without_phases_there_is_one_size() -> None:
    made = config()
    assert made.batches.samples(20) == 160 and made.batches.last_of(1) == 20
    assert made.phase_at(3) is None and made.at_step(3) is made and phases_text(made) == "none"
    assert parse_config({**made.model_dump(), "phases": {}}) == made, "every line commented out"


def test_the_last_length_may_be_a_shorter_one() -> None:
    made = config({"until_steps": 6}, {"seq_length": 8})
    assert [made.seq_lengths.at(step) for step in (1, 6, 7, 20)] == [32, 32, 8, 8]


def test_a_line_says_what_holds() -> None:
    text = phases_text(config(*THREE))
    assert text == (
        "stable until step 6 (batch 8, T 16); phase 2 until step 15 (batch 8 to 24, T 32, rotary base 500000); anneal "
        "until step 20 (batch 24, T 32, lr linear to 0, rotary yarn, factor 4 of 8 tokens, data 0.3 a 0.7 b)"
    )


BEGUN = {"until_steps": 6}


@pytest.mark.parametrize(
    ("phases", "sections", "lines"),
    [
        ([{}, {}], {}, ["phases[0].until_steps: is required, or until_tokens; only the last phase ends with the run"]),
        (
            [{"until_steps": 6, "until_tokens": 9}, {}],
            {},
            ["phases[0].until_steps: give it or until_tokens, and not both"],
        ),
        (
            [{**BEGUN, "name": "a\nb"}, {}],
            {},
            ["phases[0].name: 'a\\nb' cannot be shown on one line"],
        ),
        (
            [{**BEGUN, "name": "phase 2"}, {}],
            {},
            ["phases: 'phase 2' is the name of more than one phase"],
        ),
        (
            [BEGUN, {"until_tokens": 6 * 8 * 32}, {}],
            {},
            ["phases[1]: ends at step 6, which is not after step 6 where it begins"],
        ),
        (
            [{"until_steps": 20}, {}],
            {},
            ["phases[0]: ends at step 20, but the run at train.train_iters 20; let it end earlier"],
        ),
        (
            [BEGUN, {"until_steps": 19}],
            {},
            [
                "phases[1]: the last phase ends at step 19, but the run at train.train_iters 20; leave out its end, or "
                "set train.train_iters to it"
            ],
        ),
        (
            [{**BEGUN, "global_batch_size": [8, 8]}, {}],
            {},
            ["phases[0].global_batch_size: [8, 8] does not rise; a constant one is a number"],
        ),
        (
            [{**BEGUN, "global_batch_size": [8]}, {}],
            {},
            ["phases[0].global_batch_size: must be a number or [FIRST, LAST], got [8]"],
        ),
        (
            [{**BEGUN, "global_batch_size": [1, 4096]}, {}],
            {},
            [
                "phases[0].global_batch_size: [1, 4096] passes through 4,095 sizes, 1,000 are possible; choose ends "
                "with a larger common divisor"
            ],
        ),
        (
            [{**BEGUN, "global_batch_size": [4, 7]}, {}],
            {},
            ["phases[0].global_batch_size: 7 is not a multiple of train.micro_batch_size 2"],
        ),
        (
            [BEGUN, {"seq_length": 12}],
            {},
            ["phases[1].seq_length: 12 does not divide model.seq_length 32; nearest that do: 8, 16"],
        ),
        (
            [BEGUN, {"data_path": []}],
            {},
            ["phases[1].data_path: is empty; leave it out to go on with the blend before"],
        ),
        (
            [BEGUN, {"lr": 1e-4, "min_lr": 1e-3}],
            {},
            ["phases[1].min_lr: 0.001 is above lr 0.0001"],
        ),
        (
            [BEGUN, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 12, "lr_warmup_iters": 3}],
            {},
            ["phases[1].lr_wsd_decay_iters: 12 and lr_warmup_iters 3 do not fit into its 14 steps"],
        ),
        (
            [{**BEGUN, "lr": 1e-3}, {}],
            {"optim": {"lr_warmup_iters": 9}},
            ["phases[0].lr_warmup_iters: 9 is above its 6 steps"],
        ),
        (
            [BEGUN, {"lr_decay_style": "linear", "lr_wsd_decay_iters": 2}],
            {},
            ["phases[1].lr_wsd_decay_iters: 2 has no effect with lr_decay_style 'linear'; remove it"],
        ),
        (
            [BEGUN, {"rotary_scaling": YARN, "rotary_base": 0.5}],
            {},
            ["phases[1].rotary_base: rotary_scaling.type yarn needs one above 1, got 0.5"],
        ),
        (
            [BEGUN, {}],
            {"data": {"seq_length_curriculum": [{"until_steps": 2, "seq_length": 8}]}},
            ["phases: cannot be used together with data.seq_length_curriculum; give phases a seq_length"],
        ),
        (
            [BEGUN, {}],
            {"growth": {"method": "vanilla", "stages": [{"until_steps": 2, "operator": "g_stack"}]}},
            ["phases: cannot be used together with growth.stages; leave one of them out"],
        ),
    ],
)
def test_refused(phases: list[dict[str, Any]], sections: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config(*phases, **sections)
    said = [line.removeprefix("configuration: ").strip() for line in str(refused.value).splitlines()]
    assert [line for line in said if not line.endswith(" problems")] == lines


def test_every_batch_size_divides_among_the_ranks() -> None:
    made = config(BEGUN, {"global_batch_size": [8, 12]})
    assert made.num_micro_batches(2) == 2 and made.num_micro_batches(2, 12) == 3
    with pytest.raises(ConfigError, match=r"^phases\[1\]: batch sizes do not multiply: global_batch_size 12 != micro"):
        made.num_micro_batches(4)
