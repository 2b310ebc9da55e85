"""All that ``--preset`` knows: the paper's method and its baselines (config/presets.py), and models that grow.

A preset of a growing model takes the file's ``model`` as the final one and makes the first stage's of it, so that runs
of one file under any of these presets end with the same model after the same tokens. Stages follow from the file's
layers and steps. docs/growing.md says what of each is its source's, and what is chosen here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from pydantic import ValidationError

from megatron_sgt.config.base import count
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.config.presets import BASELINES, Preset, Values, baseline, own_folder, section
from megatron_sgt.config.run import TrainConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import resized
from megatron_sgt.stages.optimizer import REWOUND_STEP, SAFE_BETA2
from megatron_sgt.stages.timing import fitted_parameters, g_stack_time, half_boundaries, prop_boundaries

MOST_BLOCKS = 6
"""Of MIDAS's source: a model of 24 layers grows by blocks of 4."""
AUTO_PROG_DECAY = 0.9996
"""Of the average that AutoProg's source copies layers from."""


@dataclass(frozen=True)
class Target:
    """What a file asks for: its final model, and what decides how that comes about.

    ``tp``: the tensor-parallel size. ``lengths``: whether it gives a curriculum of sequence lengths.
    """

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    tp: int
    lengths: bool = False

    @property
    def steps(self) -> int:
        return self.train.train_iters

    def rewarm(self) -> str:
        """The learning rate rises again as at the beginning, at the latest until the end."""
        warmup = min(self.optim.lr_warmup_iters, max(1, self.steps // 10))
        return f"rewarm({warmup})" if warmup else "continue"

    def rewind(self, step: int) -> str:
        """After ``step`` the learning rate goes back to the end of the warm-up, if that is over, the decay not."""
        warmup, end = self.optim.lr_warmup_iters, self.optim.lr_decay_iters or self.steps
        return f"rewind({warmup})" if 0 < warmup < step < end else "continue"

    def divided(self, by: int) -> int:
        """The layers of the first stage, of which ``by`` times as many must come."""
        layers = self.model.num_layers
        if layers % by:
            raise ConfigError(f"model.num_layers {layers} is no multiple of {by}; choose one")
        return layers // by


@dataclass(frozen=True)
class GrowingPreset:
    """A model that grows. ``plan``: to the sizes of the first stage, the stages' ends, and other sections' values."""

    summary: str
    plan: Callable[[Target], tuple[dict[str, Any], list[Values], Values]]
    method: str = "vanilla"

    def named(self, name: str) -> Preset:
        """What ``--preset name`` does."""
        return lambda file: self._values(name, file)

    def _values(self, name: str, file: Mapping[str, Any]) -> Values:
        folder, target = own_folder(name, file), _target(file)
        if target is None:
            return folder
        if section(file, "growth").get("stages"):
            raise ConfigError(
                f"--preset {name}: growth.stages has stages already, so that model is not the final one; give one of "
                "both"
            )
        try:
            first, stages, others = self.plan(target)
            model = _first_model(target.model, first)
            growth = {**BASELINES[self.method](target.model.num_layers), **self._unused(), "stages": stages}
            _check_layers({**file, "growth": {**section(file, "growth"), **growth}}, model["num_layers"])
        except ConfigError as error:
            raise ConfigError(f"--preset {name}: {error}") from None
        return {"model": model, "growth": growth, **others, **folder}

    def _unused(self) -> Values:
        """Nothing is selected without loops, so that no layer need be kept from it."""
        return {"exclude_layers": []} if self.method == "vanilla" else {}


def _check_layers(file: Mapping[str, Any], first: int) -> None:
    """Refuse layers that the final model has, and the first stage of ``first`` layers has not."""
    for name, key in (("growth", "exclude_layers"), ("train", "recompute_layers")):
        layers = section(file, name).get(key)
        late = [n for n in layers if isinstance(n, int) and n >= first] if isinstance(layers, list | tuple) else []
        if late:
            raise ConfigError(
                f"{name}.{key} {late}: the first stage has {first} layers, 0 to {first - 1}; name layers of it only, "
                "all copies of which are meant"
            )


def _target(file: Mapping[str, Any]) -> Target | None:
    """None where a section is wrong, which is refused later, together with all other problems."""
    tp = section(file, "parallel").get("tensor_model_parallel_size", 1)
    try:
        return Target(
            ModelConfig.model_validate(section(file, "model")),
            TrainConfig.model_validate(section(file, "train")),
            OptimConfig.model_validate(section(file, "optim")),
            tp if isinstance(tp, int) and tp > 0 else 1,
            bool(section(file, "data").get("seq_length_curriculum")),
        )
    except ValidationError:
        return None


def _first_model(final: ModelConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """What the file's model section must say for the first stage: all sizes, where one is derived from others."""
    first = resized(final, **sizes)
    if set(sizes) == {"num_layers"}:
        return {"num_layers": first.num_layers}
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return {name: getattr(first, name) for name in (*names, "layernorm_epsilon")}


def _g_stack(factor: int) -> Callable[[Target], tuple[dict[str, Any], list[Values], Values]]:
    def plan(target: Target) -> tuple[dict[str, Any], list[Values], Values]:
        per_step = target.train.global_batch_size * target.model.seq_length
        fit = g_stack_time(fitted_parameters(target.model), target.steps * per_step)
        step = int(fit.tokens / per_step)
        stage = {"operator": "g_stack", "options": {"factor": factor}, "lr_policy": target.rewarm()}
        first = {"num_layers": target.divided(factor)}
        return first, [{"until_steps": _between(step, target), **stage}], {}

    return plan


def _blocks(operator: str, alpha: float, even: bool = False) -> Callable[[Target], tuple[Any, list[Values], Values]]:
    """As many blocks, up to MOST_BLOCKS, as divide the layers; ``even``: into blocks of an even number."""

    def plan(target: Target) -> tuple[dict[str, Any], list[Values], Values]:
        layers = target.model.num_layers
        fitting = (n for n in range(2, MOST_BLOCKS + 1) if layers % (n * (1 + even)) == 0)
        blocks = max(fitting, default=0)
        if not blocks:
            of = "an even number of layers" if even else "layers"
            raise ConfigError(f"model.num_layers {layers} is not 2 to {MOST_BLOCKS} blocks of {of}; choose one that is")
        size = layers // blocks
        ends = prop_boundaries(target.steps, blocks, alpha)
        stages = [{"until_steps": end, "operator": operator, "options": {"block_size": size}} for end in ends]
        return {"num_layers": size}, stages, {}

    return plan


def _msg(target: Target) -> tuple[dict[str, Any], list[Values], Values]:
    """Feed-forward width, layers, residual stream, heads, layers: in the order of the source's script."""
    first, final = _shared(_small(target.model), target.tp), target.model
    half = max(first["num_layers"], final.num_layers // 2)
    order = [
        {"ffn_hidden_size": final.ffn_hidden_size},
        {"num_layers": half},
        {"hidden_size": final.hidden_size},
        {"num_attention_heads": final.num_attention_heads, "num_query_groups": final.num_query_groups},
        {"num_layers": final.num_layers},
    ]
    sizes, growths = dict(first), []
    for options in order:
        if any(sizes[name] != size for name, size in options.items()):
            growths.append(options)
        sizes |= options
    return first, _msg_stages(target, growths), {}


def _msg_ffn(target: Target) -> tuple[dict[str, Any], list[Values], Values]:
    width = target.model.ffn_hidden_size
    first = _shared({"ffn_hidden_size": _small(target.model)["ffn_hidden_size"]}, target.tp)
    return first, _msg_stages(target, [{"ffn_hidden_size": width}]), {}


def _small(model: ModelConfig) -> dict[str, Any]:
    """The first stage of MSG: a quarter of the layers and of the feed-forward width, two thirds of the rest.

    The same under every layout, so that a run may go on under another: in multiples that up to eight tensor-parallel
    ranks can share, as far as the final model's sizes are; 64 units for each of them, where it is wide.
    """
    ffn = model.ffn_hidden_size // 4
    unit = gcd(model.num_query_groups, 8) if model.num_query_groups >= 8 else 1
    groups = _multiple(model.num_query_groups * 2 // 3, unit)
    hidden = _multiple(model.hidden_size * 2 // 3, model.kv_channels)
    if hidden > model.hidden_size:  # heads that are wider than the residual stream
        hidden = model.hidden_size
    return {
        "num_layers": max(1, model.num_layers // 4),
        "hidden_size": hidden,
        "ffn_hidden_size": _multiple(ffn, gcd(model.ffn_hidden_size, 512 if ffn >= 512 else 8)),
        "num_query_groups": groups,
        "num_attention_heads": groups * (model.num_attention_heads // model.num_query_groups),
        # Goes down again as the residual stream grows.
        "layernorm_epsilon": model.layernorm_epsilon * model.hidden_size / hidden,
    }


def _shared(first: dict[str, Any], tp: int) -> dict[str, Any]:
    """``first``, which ``tp`` tensor-parallel ranks can share.

    Raises:
        ConfigError: they cannot.
    """
    for name in ("ffn_hidden_size", "num_query_groups"):
        if name in first and first[name] % tp:
            raise ConfigError(
                f"parallel.tensor_model_parallel_size {tp} does not divide the {first[name]} of model.{name} in the "
                "first stage; choose one that does"
            )
    return first


def _multiple(size: int, unit: int) -> int:
    """The largest multiple of ``unit`` up to ``size``, at least one."""
    return max(1, size // unit) * unit


def _msg_stages(target: Target, growths: list[dict[str, Any]]) -> list[Values]:
    """Growths at equal distances in the first half of the run."""
    stages = []
    for number, (step, options) in enumerate(zip(half_boundaries(target.steps, len(growths)), growths, strict=True), 1):
        stage: Values = {"until_steps": step, "operator": "msg", "options": options}
        if number <= 2:  # the source's script goes back twice
            stage["lr_policy"] = target.rewind(step)
        if target.optim.adam_beta2 > SAFE_BETA2:
            stage["optimizer"] = f"rewind({REWOUND_STEP})"
        stages.append(stage)
    return stages


def _compound_grow(target: Target) -> tuple[dict[str, Any], list[Values], Values]:
    """Half of the layers and a quarter of the feed-forward units; all layers; all units. Short sequences at first."""
    width = target.model.ffn_hidden_size
    if width % 4:
        raise ConfigError(f"model.ffn_hidden_size {width} is no multiple of 4; choose one")
    first = {"num_layers": target.divided(2), "ffn_hidden_size": width // 4}
    one, two = prop_boundaries(target.steps, 3, 0)
    rate = target.rewarm()
    depth = {"until_steps": one, "operator": "g_stack", "options": {"factor": 2}, "lr_policy": rate}
    units = {"until_steps": two, "operator": "compound_grow", "options": {"factor": 4}, "lr_policy": rate}
    if target.lengths:
        return first, [depth, units], {}
    length = target.model.seq_length
    if length % (2 * target.tp) or length < 4:
        raise ConfigError(
            f"model.seq_length {length} has no half that {count(target.tp, 'tensor-parallel rank')} can share, for the "
            "first third; choose another, or give data.seq_length_curriculum"
        )
    shorter = [{"until_steps": one, "seq_length": length // 2}]
    return first, [depth, units], {"data": {"seq_length_curriculum": shorter}}


def _auto_prog(target: Target) -> tuple[dict[str, Any], list[Values], Values]:
    """Four equal stages, from half of the layers on."""
    layers = target.model.num_layers
    depths = [max(1, round(layers * (3 + n) / 6)) for n in range(4)]
    if depths[0] == layers:
        raise ConfigError("model.num_layers 1 has no half; choose more")
    stages = [
        {"until_steps": end, "operator": "auto_prog", "options": {"num_layers": after}, "weights": "ema"}
        for end, before, after in zip(prop_boundaries(target.steps, 4, 0), depths, depths[1:], strict=False)
        if after > before
    ]
    # An average over more than a tenth of a stage would be of weights long gone.
    decay = min(AUTO_PROG_DECAY, max(0.5, round(1 - 40 / target.steps, 6)))
    averaged = {} if target.train.ema_decay else {"train": {"ema_decay": decay}}
    return {"num_layers": depths[0]}, stages, averaged


def _between(step: int, target: Target) -> int:
    """``step``, or the nearest step inside of the run.

    Raises:
        ConfigError: it has none.
    """
    if target.steps < 2:
        raise ConfigError(f"train.train_iters {target.steps} is one step, so that none is left to grow after")
    return min(max(1, step), target.steps - 1)


GROWING: dict[str, GrowingPreset] = {
    "g-stack-2": GrowingPreset("half of the layers, stacked twice after the fitted time (at most 10 %)", _g_stack(2)),
    "g-stack-4": GrowingPreset("a quarter of the layers, stacked four times then", _g_stack(4)),
    "grad-stack": GrowingPreset("2 to 6 blocks, the last one copied; Prop-2", _blocks("grad_stack", 2)),
    "midas": GrowingPreset("2 to 6 blocks, the middle one copied; Prop-2", _blocks("midas", 2)),
    "lidas": GrowingPreset(
        "2 to 6 blocks of an even size, layers around the middle copied; Prop-1.5", _blocks("lidas", 1.5, even=True)
    ),
    "msg": GrowingPreset("width, layers, residual stream, heads and layers again, in the first half", _msg),
    "msg-ffn": GrowingPreset("a quarter of the feed-forward width, all of it from half of the run on", _msg_ffn),
    "compound-grow": GrowingPreset(
        "half of the layers, of the sequence length, and a quarter of the feed-forward width; deeper and longer after "
        "a third, wider after two",
        _compound_grow,
    ),
    "auto-prog": GrowingPreset(
        "half of the layers, more after each quarter, from an average of the weights", _auto_prog
    ),
    "sgt-g-stack-2": GrowingPreset("as g-stack-2, with the file's loops that go on through it", _g_stack(2), "sgt"),
}
"""Presets of models that grow."""

PRESETS: dict[str, Preset] = {
    **{name: baseline(name) for name in BASELINES},
    **{name: growing.named(name) for name, growing in GROWING.items()},
}
"""All."""


def preset_named(name: str | None) -> Preset | None:
    """The preset ``name``; None for None.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return None
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"--preset {name}: choose one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]
