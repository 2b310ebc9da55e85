"""Presets of models that grow: all of one file end with the file's model, after the file's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config, load_config
from megatron_sgt.config.presets import BASELINES
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.presets import GROWING, PRESETS, preset_named
from megatron_sgt.stages.stages import stages_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
QUICKSTART = ("quickstart", "model.num_layers=8")
FILES = [QUICKSTART, ("sgt_300m",), ("sgt_7b",), ("sgt_70b",)]
CHANGED = {"auto-prog": {"train"}, "compound-grow": {"data"}}
"""Sections beside model, growth and logging that a preset has a say in."""
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def loaded(preset: str | None, name: str, *overrides: str) -> Config:
    return load_config(EXAMPLES / f"{name}.yaml", overrides, preset_named(preset))


def small(preset: str, *overrides: str) -> Config:
    return loaded(preset, *QUICKSTART, *overrides)


def plan(config: Config) -> list[tuple[int, dict[str, Any]]]:
    return [(stage.until_steps or 0, stage.options) for stage in config.growth.stages]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file[0])
@pytest.mark.parametrize("preset", GROWING)
def test_ends_with_the_model_of_the_file(preset: str, file: tuple[str, ...]) -> None:
    config, plain = loaded(preset, *file), loaded(None, *file)
    stages = stages_of(config)
    assert len(stages) >= 2
    wanted = plain.model
    assert stages[-1].config.model == wanted != stages[0].config.model
    assert config.logging.run_dir == f"{plain.logging.run_dir}-{preset}"
    same = {"parallel", "optim", "data", "checkpoint", "train"} - CHANGED.get(preset, set())
    assert config.model_dump(include=same) == plain.model_dump(include=same)
    assert config.growth.method == ("sgt" if preset.startswith("sgt") else "vanilla")


def test_a_model_of_24_layers_grows_as_in_the_sources() -> None:
    midas = loaded("midas", "sgt_300m", "train.train_iters=10000")
    assert plan(midas) == [(step, {"block_size": 4}) for step in (109, 548, 1537, 3295, 6042)]
    assert midas.model.num_layers == 4
    (stack,) = loaded("g-stack-4", "sgt_300m").growth.stages
    assert stack.until_steps == 476  # a tenth of 4768: the fit says 11.7 of 20 billion tokens
    assert (stack.options, stack.lr_policy) == ({"factor": 4}, "rewarm(250)")
    prog = loaded("auto-prog", "sgt_300m")
    assert [options["num_layers"] for _, options in plan(prog)] == [16, 20, 24]
    assert (prog.model.num_layers, prog.growth.stages[0].weights) == (12, "ema")
    assert prog.train.ema_decay == pytest.approx(1 - 40 / 4768, abs=1e-6)


def test_a_large_run_is_stacked_when_the_fit_says() -> None:
    long = loaded("g-stack-4", "sgt_7b", "train.train_iters=500000")  # 2.1 T tokens
    (stack,) = long.growth.stages
    tokens = (stack.until_steps or 0) * long.train.global_batch_size * long.model.seq_length
    assert tokens == pytest.approx(10.7e9, rel=0.01)  # 11.1 at 7.0 B parameters and D = 2 T
    known = loaded("g-stack-4", "sgt_7b", "train.train_iters=500000", "model.vocab_size=50000")
    assert known.growth.stages == long.growth.stages  # a tokenizer's vocabulary decides nothing


def test_msg_grows_in_the_order_of_its_script() -> None:
    config = small("msg")
    assert [getattr(config.model, name) for name in SIZES] == [2, 64, 96, 2, 2]
    assert config.model.kv_channels == 32
    assert plan(config) == [
        (16, {"ffn_hidden_size": 384}),
        (32, {"num_layers": 4}),
        (48, {"hidden_size": 128}),
        (64, {"num_attention_heads": 4, "num_query_groups": 4}),
        (80, {"num_layers": 8}),
    ]
    assert [stage.lr_policy for stage in config.growth.stages] == ["rewind(10)"] * 2 + ["continue"] * 3
    late = small("msg-ffn", "optim.adam_beta2=0.999").growth.stages
    assert [stage.optimizer for stage in late] == ["rewind(10)"]
    stages_of(small("msg", "optim.adam_beta2=0.999"))


@pytest.mark.parametrize("file", [*FILES, ("vanilla_1.2b",)], ids=lambda file: file[0])
def test_the_first_model_of_msg_does_not_depend_on_the_layout(file: tuple[str, ...]) -> None:
    models, refused = [], []
    for ranks in (2, 4, 8):
        try:
            config = loaded("msg", *file, f"parallel.tensor_model_parallel_size={ranks}")
        except ConfigError as error:
            refused.append(str(error))
        else:
            models.append((config.model, config.growth.stages))
    assert all(model == models[0] for model in models)
    says = "--preset msg: parallel.tensor_model_parallel_size {} does not divide the 2 of model.num_query_groups in the"
    few = [4, 8] if file is QUICKSTART else []  # of two heads
    assert len(refused) == len(few)
    assert all(line.startswith(says.format(ranks)) for line, ranks in zip(refused, few, strict=True))


@pytest.mark.parametrize("sizes", [(1024, 128, 1e-5), (2560, 128, 1e-6), (4096, 128, 1.5e-5)])
def test_msg_ends_with_the_epsilon_of_the_file(sizes: tuple[int, int, float]) -> None:
    hidden, head, epsilon = sizes
    model = f"model.hidden_size={hidden} model.kv_channels={head} model.layernorm_epsilon={epsilon}".split()
    assert stages_of(small("msg", *model))[-1].config.model == loaded(None, *QUICKSTART, *model).model


def test_a_short_run_of_msg_has_a_step_for_each_stage() -> None:
    assert [step for step, _ in plan(small("msg", "train.train_iters=8", "optim.lr_warmup_iters=1"))] == [1, 2, 3, 4, 5]


def test_after_the_decay_msg_does_not_go_back() -> None:
    policies = [stage.lr_policy for stage in small("msg", "optim.lr_decay_iters=20").growth.stages]
    assert policies == ["rewind(10)", *["continue"] * 4]


def test_what_the_file_gives_stays() -> None:
    own = small("compound-grow", "data.seq_length_curriculum=[{until_steps: 7, seq_length: 32}]")
    assert [(one.until_steps, one.seq_length) for one in own.data.seq_length_curriculum] == [(7, 32)]
    assert small("auto-prog", "train.ema_decay=0.9999999").train.ema_decay == 0.9999999


def test_compound_grow_begins_with_short_sequences() -> None:
    config = small("compound-grow")
    assert plan(config) == [(53, {"factor": 2}), (106, {"factor": 4})]
    assert [(entry.until_steps, entry.seq_length) for entry in config.data.seq_length_curriculum] == [(53, 64)]


def test_the_command_line_says_the_final_model() -> None:
    config = loaded("g-stack-2", "quickstart", "model.num_layers=12", "growth.exclude_layers=[0,1]")
    assert (config.model.num_layers, config.growth.exclude_layers) == (6, (0, 1))


def test_layers_that_a_file_excludes_are_no_trouble_without_loops(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    own = "model: {num_layers: 8}\ngrowth: {exclude_layers: [0, 5]}"
    file.write_text(f"base: {EXAMPLES / 'quickstart.yaml'}\n{own}")
    assert load_config(file, (), preset_named("midas")).growth.exclude_layers == ()
    with pytest.raises(ConfigError, match=r"preset sgt-g-stack-2: growth\.exclude_layers \[5\]: the first stage has 4"):
        load_config(file, (), preset_named("sgt-g-stack-2"))


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("g-stack-4", ["model.num_layers=6"], "model.num_layers 6 is no multiple of 4"),
        ("midas", ["model.num_layers=7"], "model.num_layers 7 is not 2 to 6 blocks of layers"),
        ("lidas", ["model.num_layers=6", "train.train_iters=2"], "train_iters 2 has no step for each of 3 stages"),
        ("lidas", ["model.num_layers=9"], "is not 2 to 6 blocks of an even number of layers"),
        ("compound-grow", ["model.ffn_hidden_size=390"], "model.ffn_hidden_size 390 is no multiple of 4"),
        ("compound-grow", ["model.seq_length=127"], "model.seq_length 127 has no half that 2 tensor-parallel ranks"),
        ("auto-prog", ["model.num_layers=1", "growth.top_k_layers=1", "growth.exclude_layers=[]"], "has no half"),
        ("g-stack-2", ["train.train_iters=1", "optim.lr_warmup_iters=0"], "none is left to grow after"),
        ("msg", ["train.train_iters=5"], "train_iters 5 has no step for each of 6 stages"),
        (
            "midas",
            ["train.recompute_granularity=full", "train.recompute_layers=[1,5]"],
            r"train.recompute_layers \[5\]: the first stage has 2 layers, 0 to 1; name layers of it only",
        ),
        ("midas", ["growth.stages=[{until_steps: 3, operator: midas}]"], "growth.stages has stages already"),
    ],
)
def test_what_cannot_grow_is_refused(preset: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--preset {preset}: .*{message}"):
        small(preset, *overrides)


def test_loops_that_the_first_stage_has_no_layers_for() -> None:
    with pytest.raises(ConfigError, match=r"growth\.top_k_layers: 3 is above the 2 layers"):
        loaded("sgt-g-stack-2", "quickstart")


@pytest.mark.parametrize("wrong", ["model=5", "model.num_layers=x", "train=[1]", "parallel=3", "logging=2"])
def test_a_wrong_file_is_explained_as_without_a_preset(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        small("g-stack-2", wrong)


def test_names() -> None:
    assert set(PRESETS) == {*BASELINES, *GROWING}
    assert preset_named(None) is None
    with pytest.raises(ConfigError, match=r"choose one of vanilla, .*g-stack-2.*did you mean 'sgt-lowest-heads'"):
        preset_named("sgt-lowest-head")
    with pytest.raises(ConfigError, match="did you mean 'g-stack-2'"):
        preset_named("g_stack-2")
