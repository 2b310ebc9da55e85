"""The run that continues an imported model: its configuration, and where its growth stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint.layout import GROWTH_STATE
from megatron_sgt.config import Config, load_config, parse_config
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.config.yaml_io import dump_yaml
from megatron_sgt.errors import ConfigError
from megatron_sgt.export.hf.families import HFModel
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.growth.methods import settings_for
from megatron_sgt.planning.structure import schedule_of

RUN_FILE = "run.yaml"
"""Where the configuration of the run to come lies, beside the checkpoint that it starts from."""

MAX_SEQ_LENGTH = 4096
PADDINGS = (128, 64, 32, 16, 8)
"""Multiples of the vocabulary, best first: up to these tensor-parallel sizes its rows need no padding."""

_HEADER = """\
# Continues the pretraining of {source}; written by tools/convert_from_hf.py.
# Set data.data_path, the learning rate and the lengths; everything in the section model belongs to the weights,
# except seq_length and the dropouts. The section growth {growth}.
#   torchrun --nproc-per-node 8 pretrain_sgt.py --config {path} data.data_path=PREFIX
"""
# What the weights do not fix.
_FREE = ("seq_length", "attention_dropout", "hidden_dropout", "init_method_std", "use_cpu_initialization")


def run_config(
    model: HFModel, root: Path, tokenizer: TokenizerConfig | None, seq_length: int | None, padding: int | None
) -> Config:
    """A run that starts from the import in ``root``: the model's shape, defaults for everything else.

    Args:
        tokenizer: of the imported folder, None without one.
        seq_length: tokens per training sequence; None: the model's context, or its sliding window where that is
            less, at most MAX_SEQ_LENGTH.
        padding: multiple to pad the vocabulary to; None: the largest of PADDINGS that needs no padding, or the
            first.

    Raises:
        ConfigError: the model cannot be trained with these values, or would see more of a sequence than its sliding
            window.
    """
    vocabulary = model.fields["vocab_size"]
    multiple = padding or next((n for n in PADDINGS if vocabulary % n == 0), PADDINGS[0])
    length = seq_length or min(model.max_position_embeddings, MAX_SEQ_LENGTH, model.window or MAX_SEQ_LENGTH)
    if problem := model.window_problem(length):
        raise ConfigError(f"--seq-length: {problem}; give {model.window} at most")
    fields = {name: value for name, value in model.fields.items() if value is not None}
    values = {
        "model": {**fields, "seq_length": length, "make_vocab_size_divisible_by": multiple},
        "growth": settings_for(plan_of(model), model.fields["num_attention_heads"]),
        "optim": {"lr": 1e-4, "min_lr": 1e-5, "lr_warmup_iters": 100},
        "train": {"train_iters": 2000, "micro_batch_size": 1, "global_batch_size": 64},
        "data": {"tokenizer": None if tokenizer is None else tokenizer.model_dump()},
        "checkpoint": {"load": str(root), "save_interval": 500},
        "logging": {"run_dir": f"runs/{root.name or 'imported'}"},
    }
    return parse_config(values, source=f"the model in {root}")


def fitting_config(path: Path, model: HFModel) -> Config:
    """The run in the YAML file ``path``, if it can continue ``model``.

    Raises:
        ConfigError: the file is wrong, or its model or its growth is another one; every difference is named.
    """
    config = load_config(path)
    problems = []
    here = config.model.model_dump(exclude={"rotary_scaling": {"context_length"}}, exclude_none=True)
    for name, value in model.fields.items():
        found, wanted = here.get(name), value
        if isinstance(value, dict):  # of a scaling, what changes no position is free
            wanted = {key: part for key, part in value.items() if key != "context_length"}
        if name not in _FREE and found != wanted:
            problems.append(f"model.{name}: is {found}, the imported model has {wanted}")
    if problem := model.window_problem(config.model.seq_length):
        problems.append(f"model.seq_length: {problem}")
    try:
        growth_state(model, config)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(f"{path} does not fit the imported model:\n  " + "\n  ".join(problems))
    return config


def run_yaml(config: Config, source: Path, path: Path, grown: bool) -> str:
    """The text of a configuration file: what was chosen for the import, not every default."""
    header = _HEADER.format(
        source=source, path=path, growth="belongs to the model's loops" if grown else "may be changed"
    )
    return header + dump_yaml(config.model_dump(exclude_unset=True))


def growth_state(model: HFModel, config: Config) -> dict[str, Any]:
    """The state of the hooks in a checkpoint of ``model``: none where growth begins with the run.

    A model with loops keeps them, and grows no further.

    Raises:
        ConfigError: this configuration does not allow it.
    """
    if not model.loops:
        return {}
    schedule = schedule_of(config)
    schedule.adopt(plan_of(model))
    return {GROWTH_STATE: {"schedule": schedule.state_dict(), "events": []}}


def plan_of(model: HFModel) -> LoopPlan:
    """What ``model`` executes."""
    layers = (
        (int(n), LayerPlan(loop.get("depth", 0), tuple(sorted(loop.get("heads", ()))), 0.0, loop.get("block_loops", 0)))
        for n, loop in model.loops.items()
    )
    return LoopPlan(model.fields["num_layers"], tuple(layers))
