"""Rules between sections, batch arithmetic, and the pass-through to DeepSpeed."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config, load_config, parse_config
from megatron_sgt.errors import ConfigError

VALUES: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 6,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "vocab_size": 256,
    },
    "optim": {"lr": 3e-3},
    "train": {"train_iters": 100, "micro_batch_size": 2, "global_batch_size": 8},
}


def make(**sections: dict[str, Any]) -> Config:
    """Return the small configuration with some values replaced, e.g. train={"seed": 1}."""
    names = {**VALUES, **sections}
    return parse_config({name: {**VALUES.get(name, {}), **sections.get(name, {})} for name in names})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": {"tensor_model_parallel_size": 3}},
            "model.num_attention_heads: 4 is not a multiple of tensor_model_parallel_size 3",
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 4}, "model": {"num_query_groups": 2}},
            "model.num_query_groups: 2 is not a multiple of tensor_model_parallel_size 4",
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 4}, "model": {"ffn_hidden_size": 130}},
            "model.ffn_hidden_size: 130 is not a multiple of tensor_model_parallel_size 4",
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 4}, "model": {"make_vocab_size_divisible_by": 2}},
            "model.make_vocab_size_divisible_by: 2 is not a multiple of tensor_model_parallel_size 4",
        ),
        ({"model": {"vocab_size": None}}, "model.vocab_size: is required when data.tokenizer is null"),
        (
            {"growth": {"exclude_layers": [0, 6]}},
            "growth.exclude_layers: [6] outside the model's layers 0..5",
        ),
        ({"growth": {"exclude_layers": [-1]}}, "growth.exclude_layers: [-1] outside the model's layers 0..5"),
        (
            {"growth": {"method": "block_loop", "block_loop_layers": [7]}},
            "growth.block_loop_layers: [7] outside the model's layers 0..5",
        ),
        ({"growth": {"num_keep_heads": 5}}, "growth.num_keep_heads: 5 is above model.num_attention_heads 4"),
        (
            {"growth": {"top_k_layers": 5, "exclude_layers": [0, 1]}},
            "growth.top_k_layers: 5 is above the 4 layers that may be selected (6 layers, 2 in exclude",
        ),
        (
            {"parallel": {"sequence_parallel": True}},
            "parallel.sequence_parallel: needs tensor_model_parallel_size",
        ),
        (
            {
                "parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 4},
                "model": {"seq_length": 66},
            },
            "parallel.sequence_parallel: model.seq_length 66 is not a multiple of tensor_model_parallel",
        ),
        (
            {"parallel": {"zero_stage": 0}, "train": {"precision": "bf16"}},
            "parallel.zero_stage: bf16 with zero_stage 0",
        ),
        ({"parallel": {"zero_stage": 0, "device": "cuda"}}, "parallel.zero_stage: bf16 with zero_stage 0"),
        (
            {"train": {"micro_batch_size": 3}},
            "train.global_batch_size: 8 is not a multiple of train.micro_batch_size 3",
        ),
        ({"optim": {"lr_warmup_iters": 101}}, "optim.lr_warmup_iters: 101 is above train.train_iters 100"),
        (
            {"optim": {"lr_warmup_iters": 60, "lr_decay_iters": 50}},
            "optim.lr_warmup_iters: 60 is above optim.lr_decay_iters 50",
        ),
        (
            {"optim": {"lr_decay_style": "WSD", "lr_warmup_iters": 60, "lr_wsd_decay_iters": 41}},
            "optim.lr_wsd_decay_iters: 41 and lr_warmup_iters 60 do not fit into train.train_iters 100",
        ),
    ],
)
def test_cross_checks(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**sections)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tensor_model_parallel_size": 4}},
        {"parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 2}},
        {"parallel": {"zero_stage": 0}},
        {"growth": {"top_k_layers": 5}},
        {"growth": {"num_keep_heads": 9, "head_choice": "all"}},
        {"growth": {"method": "vanilla", "top_k_layers": 9, "num_keep_heads": 9}},
        {"growth": {"method": "block_loop", "block_loop_layers": [5, 3]}},
        {"optim": {"lr_decay_style": "WSD", "lr_warmup_iters": 60, "lr_wsd_decay_iters": 40}},
        {"model": {"vocab_size": None}, "data": {"tokenizer": {"type": "sentencepiece", "model": "x.model"}}},
    ],
)
def test_what_the_cross_checks_allow(sections: dict[str, Any]) -> None:
    make(**sections)


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make(growth={"num_keep_heads": 5, "top_k_layers": 6}, parallel={"sequence_parallel": True})
    text = str(caught.value)
    assert "3 problems" in text
    assert [line.strip().split(":")[0] for line in text.splitlines()[1:]] == [
        "growth.num_keep_heads",
        "growth.top_k_layers",
        "parallel.sequence_parallel",
    ]


@pytest.mark.parametrize(
    ("micro", "global_", "tensor", "world", "expected"),
    [(2, 8, 1, 1, 4), (2, 8, 1, 4, 1), (2, 8, 2, 4, 2), (1, 1024, 4, 64, 64)],
)
def test_micro_batches(micro: int, global_: int, tensor: int, world: int, expected: int) -> None:
    cfg = make(
        train={"micro_batch_size": micro, "global_batch_size": global_},
        parallel={"tensor_model_parallel_size": tensor},
    )
    assert cfg.data_parallel_size(world) == world // tensor
    assert cfg.num_micro_batches(world) == expected


@pytest.mark.parametrize(
    ("micro", "global_", "world", "message"),
    [
        (
            2,
            1000,
            16,
            "batch sizes do not multiply: global_batch_size 1000 != micro 2 x accumulation 31.25 x "
            "data parallel 16; nearest that work: 992 (accumulation 31), 1024 (accumulation 32)",
        ),
        (2, 8, 8, "accumulation 0.5 x data parallel 8; nearest that work: 16 (accumulation 1)"),
    ],
)
def test_batches_that_do_not_multiply(micro: int, global_: int, world: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(train={"micro_batch_size": micro, "global_batch_size": global_}).num_micro_batches(world)
    assert str(caught.value).endswith(message)


def test_world_that_tensor_parallel_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="2 does not divide the 3 process"):
        make(parallel={"tensor_model_parallel_size": 2}).data_parallel_size(3)


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"train_batch_size": 16}, "deepspeed.train_batch_size: 16 contradicts train.global_batch_size 8"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "deepspeed.train_micro_batch_size_per_gpu: 4 contradicts train.micro_batch_size 2",
        ),
        ({"gradient_clipping": 0.5}, "deepspeed.gradient_clipping: 0.5 contradicts optim.clip_grad 1.0"),
        (
            {"zero_optimization": {"stage": 2}},
            "deepspeed.zero_optimization.stage: 2 contradicts parallel.zero_stage 1",
        ),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage: true contradicts"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled: true contradicts train.precision 'fp32'"),
        ({"bfloat16": {"enabled": True}}, "deepspeed.bfloat16.enabled: true contradicts"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled: true contradicts train.precision 'fp32'"),
        ({"fp16": True}, "deepspeed.fp16: must be a mapping, got true"),
        ({"gradient_accumulation_steps": 3}, "3 contradicts train.global_batch_size 8, no multiple of 3 x"),
        ({"gradient_accumulation_steps": 0}, "must be 'auto' or an integer above 0, got 0"),
        ({"gradient_accumulation_steps": True}, "must be 'auto' or an integer above 0, got true"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer: is refused"),
        ({"scheduler": {}}, "deepspeed.scheduler: is refused"),
        (
            {"zero_optimisation": {}},
            "unknown key 'deepspeed.zero_optimisation'; did you mean 'zero_optimization'?",
        ),
    ],
)
def test_deepspeed_contradictions(deepspeed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(train={"precision": "fp32"}, deepspeed=deepspeed)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "deepspeed",
    [
        {},
        {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
        {"train_batch_size": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"},
        {"zero_optimization": {"stage": "auto", "overlap_comm": True}, "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}, "fp16": {"enabled": False}},
        {"gradient_clipping": 1, "comms_logger": {"enabled": True}, "steps_per_print": 100},
    ],
)
def test_deepspeed_keys_that_agree_or_are_not_ours(deepspeed: dict[str, Any]) -> None:
    assert make(train={"precision": "fp32"}, deepspeed=deepspeed).deepspeed == deepspeed


@pytest.mark.parametrize(("device", "allowed"), [("cpu", False), ("cuda", True)])
def test_deepspeed_precision_follows_a_known_device(device: str, allowed: bool) -> None:
    def build() -> Config:
        return make(parallel={"device": device}, deepspeed={"bf16": {"enabled": True}})

    if allowed:
        build()
    else:
        with pytest.raises(ConfigError, match=r"deepspeed\.bf16\.enabled: true contradicts"):
            build()


@pytest.mark.parametrize("enabled", [True, False])
def test_deepspeed_precision_cannot_be_fixed_while_the_device_decides(enabled: bool) -> None:
    with pytest.raises(ConfigError, match=r"contradicts train\.precision 'auto'"):
        make(deepspeed={"bf16": {"enabled": enabled}})


def test_deepspeed_accumulation_against_the_world_size() -> None:
    cfg = make(deepspeed={"gradient_accumulation_steps": 2})
    assert cfg.num_micro_batches(2) == 2
    with pytest.raises(ConfigError, match="gradient_accumulation_steps: 2 contradicts accumulation 4"):
        cfg.num_micro_batches(1)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", "cpu", "fp32"),
        ("auto", "cuda", "bf16"),
        ("fp16", "cuda", "fp16"),
        ("fp32", "cuda", "fp32"),
        ("bf16", "cpu", "bf16"),
    ],
)
def test_precision_on_a_device(precision: str, device: Any, expected: str) -> None:
    assert make(train={"precision": precision}).precision_on(device) == expected


def test_layers_that_are_computed_again() -> None:
    for granularity, layers, selective, full in (
        ("none", None, (), ()),
        ("full", None, (), tuple(range(6))),
        ("full", (1, 3), (), (1, 3)),
        ("selective", (5,), (5,), ()),
    ):
        cfg = make(train={"recompute_granularity": granularity, "recompute_layers": layers})
        assert (cfg.recomputed_layers("selective"), cfg.recomputed_layers("full")) == (selective, full)


def test_precision_on_a_device_without_zero() -> None:
    cfg = make(parallel={"zero_stage": 0})
    assert cfg.precision_on("cpu") == "fp32"
    with pytest.raises(ConfigError, match="zero_stage 0"):
        cfg.precision_on("cuda")


@pytest.mark.parametrize(
    ("tensor_parallel", "world_size", "precision", "zero", "expected"),
    [
        (1, 1, "fp32", {}, 0),
        (2, 2, "fp32", {}, 0),
        (1, 2, "fp32", {}, 3),
        (1, 1, "bf16", {}, 3),
        (1, 1, "fp16", {}, 3),
        (1, 1, "fp32", {"offload_optimizer": {"device": "cpu"}}, 3),
        (1, 1, "fp32", {"stage": "auto"}, 3),
    ],
)
def test_zero_needs_ranks_to_shard_over(
    tensor_parallel: int, world_size: int, precision: str, zero: dict[str, Any], expected: int
) -> None:
    layout = {"tensor_model_parallel_size": tensor_parallel, "zero_stage": 3}
    cfg = make(parallel=layout, deepspeed={"zero_optimization": zero})
    assert cfg.zero_stage_on(world_size, precision) == expected
    assert make(parallel={**layout, "zero_stage": 0}).zero_stage_on(world_size, "fp32") == 0


def test_no_fp16_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make(train={"precision": "fp16"}).precision_on("cpu")


def test_folders_and_decay_default_to_the_run() -> None:
    cfg = make(logging={"run_dir": "runs/x"})
    assert (cfg.save_dir, cfg.data_cache_dir) == (Path("runs/x/checkpoints"), Path("runs/x/data_cache"))
    assert cfg.lr_decay_iters == 100
    own = make(checkpoint={"save": "/c"}, data={"data_cache_path": "/d"}, optim={"lr_decay_iters": 7})
    assert (own.save_dir, own.data_cache_dir, own.lr_decay_iters) == (Path("/c"), Path("/d"), 7)


def test_yaml_round_trip(tmp_path: Path) -> None:
    cfg = make(
        data={
            "data_path": [0.3, "a b", 0.7, "on"],
            "split": "1",
            "tokenizer": {"type": "sentencepiece", "model": "6e-4"},
        },
        growth={"method": "block_loop", "block_loop_layers": [5, 4], "exclude_layers": []},
        optim={"adam_eps": 1e-12, "lr": 6e-4},
        logging={"progress_bar": "on", "wandb_name": "010", "run_dir": "läufe/~"},
        deepspeed={
            "comms_logger": {"enabled": True, "prof_ops": ["all_reduce", "1e3"]},
            "x": 1e-30,
            "y": None,
        },
    )
    path = tmp_path / "config.yaml"
    path.write_text(cfg.to_yaml(), encoding="utf-8")
    assert load_config(path) == cfg
    assert load_config(path).to_yaml() == cfg.to_yaml()


def test_resolved_yaml_keeps_folders_relative_to_the_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(make().to_yaml())
    assert load_config(path, ["logging.run_dir=runs/other"]).save_dir == Path("runs/other/checkpoints")


@pytest.mark.parametrize(
    ("precision", "settings", "types"),
    [
        ("fp32", {}, ("fp32", "fp32")),
        ("bf16", {}, ("fp32", "fp32")),
        ("fp16", {"grad_accum_dtype": "model"}, ("fp16", "fp32")),
        ("bf16", {"grad_reduce_dtype": "model"}, ("fp32", "bf16")),
    ],
)
def test_types_of_gradients(precision: str, settings: dict[str, Any], types: tuple[str, str]) -> None:
    assert make(optim={"lr": 1e-3, **settings}).grad_dtypes(precision) == types


@pytest.mark.parametrize(
    ("precision", "settings", "keys"),
    [
        ("bf16", {}, {"data_types": {"grad_accum_dtype": "bf16"}}),
        ("auto", {}, {"data_types": {"grad_accum_dtype": "bf16"}}),
        ("bf16", {"grad_accum_dtype": "model"}, {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("auto", {"grad_accum_dtype": "model"}, {"data_types": {"grad_accum_dtype": "bf16"}}),
        ("bf16", {}, {"communication_data_type": "bf16"}),
    ],
)
def test_types_of_gradients_given_twice(precision: str, settings: dict[str, Any], keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"contradicts optim\.grad_(accum|reduce)_dtype '(fp32|model)'"):
        make(train={"precision": precision}, optim={"lr": 1e-3, **settings}, deepspeed=keys)
    agreeing = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "auto"}
    assert make(train={"precision": "bf16"}, deepspeed=agreeing).deepspeed == agreeing


@pytest.mark.parametrize(
    ("stage", "precision", "settings", "offload", "has"),
    [
        (1, "bf16", {}, {}, True),
        (1, "bf16", {"grad_accum_dtype": "model"}, {}, False),
        (1, "bf16", {}, {"offload_optimizer": {"device": "cpu"}}, False),
        (1, "fp16", {}, {}, False),
        (2, "bf16", {}, {}, False),
    ],
)
def test_who_has_the_bf16_optimizer(
    stage: int, precision: str, settings: dict[str, Any], offload: dict[str, Any], has: bool
) -> None:
    cfg = make(
        parallel={"zero_stage": stage},
        optim={"lr": 1e-3, **settings},
        deepspeed={"zero_optimization": offload} if offload else {},
    )
    assert cfg.has_bf16_optimizer(precision) is has


@pytest.mark.parametrize(
    ("zero", "offloads"),
    [
        ({}, False),
        ({"offload_optimizer": {"device": "none"}}, False),
        ({"offload_optimizer": None}, False),
        ({"offload_param": {"device": "cpu"}}, False),
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"offload_optimizer": {"device": "nvme"}}, True),
    ],
)
def test_offload_of_the_optimizer_is_seen(zero: dict[str, Any], offloads: bool) -> None:
    assert make(deepspeed={"zero_optimization": zero}).offloads_optimizer is offloads
