"""Training through several stages in plain PyTorch, to test against: AdamW, growth, learning rate, all by hand.

Shared with megatron_sgt are the initial values and the noise, which are functions of seed, stage and name. What a
tensor becomes is said here by slices and copies (reference_growth), from the papers' formulas and not from maps.
A stage is a dict with the keys of ``growth.stages``, all of them given but ``options``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.parallel.rng import named_generator
from tests.helpers.reference_growth import Params, in_order, split_units, wider
from tests.helpers.reference_sgt import forward

StageValues = dict[str, Any]
Draw = Callable[[int], Params]
"""The initial values of all tensors of stage i's model, whole."""
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass
class Ramp:
    """MSG's mask, which is k / N in the step after k of the grown model; 1 from the N-th on.

    ``begun``: k. ``steps``: N. ``units``: how many old ones stand in front of new ones, ``layers``: how many old ones.
    """

    steps: int
    units: int
    layers: int
    begun: int = 0

    def faded(self, weights: Params) -> Params:
        """``weights`` with the mask in those that make new units, and in those that new layers write with."""
        mask = min(1.0, self.begun / self.steps)
        found = dict(weights)
        for name, weight in weights.items():
            if "gate_proj" in name:
                found[name] = torch.cat([weight[: self.units], mask * weight[self.units :]])
            elif ("o_proj" in name or "down_proj" in name) and int(name.split(".")[2]) >= self.layers:
                found[name] = mask * weight
        return found


@dataclass
class Decoder:
    """A model in training. ``step``: AdamW's; ``average``: of the weights, None: none is kept."""

    weights: Params
    heads: int
    epsilon: float
    step: int = 0
    exp_avg: Params = field(default_factory=dict)
    exp_avg_sq: Params = field(default_factory=dict)
    average: Params | None = None
    ramp: Ramp | None = None

    @property
    def layers(self) -> int:
        return 1 + max(int(name.split(".")[2]) for name in self.weights if ".layers." in name)

    def loss(self, weights: Params, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labels [B, T] of tokens [B, T]."""
        settings = {
            "num_layers": self.layers, "num_attention_heads": self.heads, "norm_eps": self.epsilon, "rope_theta": 1e4,
        }  # fmt: skip
        gates = torch.ones(self.layers, self.heads)
        if self.ramp is not None:
            weights = self.ramp.faded(weights)
        scores, _ = forward(weights, tokens, settings, [0] * self.layers, gates, {})
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())

    def train_step(self, tokens: Tensor, labels: Tensor, lr: float, decay: float) -> tuple[float, float]:
        """One step of AdamW, and of the average by ``decay``: (loss, norm of the gradient)."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.weights.items()}
        loss = self.loss(leaves, tokens, labels)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        scale = min(1.0, CLIP / (norm + 1e-6))
        self.step += 1
        for name, weight in self.weights.items():
            g = gradients[name] * scale
            m = BETAS[0] * self.exp_avg.get(name, torch.zeros_like(g)) + (1 - BETAS[0]) * g
            v = BETAS[1] * self.exp_avg_sq.get(name, torch.zeros_like(g)) + (1 - BETAS[1]) * g * g
            self.exp_avg[name], self.exp_avg_sq[name] = m, v
            unbiased = m / (1 - BETAS[0] ** self.step), v / (1 - BETAS[1] ** self.step)
            self.weights[name] = weight * (1 - lr * WEIGHT_DECAY) - lr * unbiased[0] / (unbiased[1].sqrt() + EPS)
        if self.ramp is not None:
            self.ramp.begun += 1
        if self.average is not None:
            self.average = {n: decay * a + (1 - decay) * self.weights[n] for n, a in self.average.items()}
        return float(loss.detach()), norm


def order_of(operator: str, options: dict[str, Any], layers: int) -> list[int]:
    """The old layer of each new one, of the operators that change the depth alone."""
    every = list(range(layers))
    if operator == "g_stack":
        return every * options["factor"]
    if operator == "auto_prog":  # each of the last m - l layers is followed by its copy
        once = layers - (options["num_layers"] - layers)
        return [layer for layer in every for _ in range(1 if layer < once else 2)]
    size = options["block_size"]
    blocks = [every[start : start + size] for start in range(0, layers, size)]
    middle = math.ceil(len(blocks) / 2)  # counted from 1
    if operator == "grad_stack":
        blocks.append(blocks[-1])
    elif operator == "midas":
        blocks.insert(middle, blocks[middle - 1])
    else:  # lidas: the last half of the middle block and the first half of the next, after both
        assert operator == "lidas", operator
        if len(blocks) == 1:
            return every * 2
        place, half = middle * size, size // 2
        return every[: place + half] + every[place - half : place + half] + every[place + half :]
    return [layer for block in blocks for layer in block]


def grow(old: Decoder, stage: StageValues, number: int, drawn: Params, seed: int) -> Decoder:
    """The decoder of stage ``number``, counted from 0, out of the one before it; ``drawn``: its initial values."""
    weights = old.average if stage["weights"] == "ema" else old.weights
    assert weights is not None, "stages from the average keep one"
    operator, options = stage["operator"], stage.get("options", {})
    if operator == "msg":
        new = _msg(old, options, drawn, stage["moments"], weights)
    elif operator == "compound_grow":
        new = _compound_grow(old, options, number, seed, stage["moments"], weights)
    else:
        order = order_of(operator, options, old.layers)
        new = Decoder(in_order(weights, order), old.heads, old.epsilon)
        new.exp_avg, new.exp_avg_sq = in_order(old.exp_avg, order), in_order(old.exp_avg_sq, order)
        new.average = None if old.average is None else in_order(old.average, order)
    _carry(new, old.step, stage)
    return new


def _carry(new: Decoder, step: int, stage: StageValues) -> None:
    """AdamW's step, and moments that begin anew or with another step."""
    if stage["moments"] == "fresh":
        new.exp_avg, new.exp_avg_sq = {}, {}
    if stage["optimizer"] == "fresh":
        new.step = 0
        return
    new.step = step
    if rewind := re.fullmatch(r"rewind\((\d+)\)", stage["optimizer"]):
        new.step = min(step, int(rewind.group(1)))
        for moments, beta in ((new.exp_avg, BETAS[0]), (new.exp_avg_sq, BETAS[1])):
            for name in moments:
                moments[name] = moments[name] * (1 - beta**new.step) / (1 - beta**step)


def _msg(old: Decoder, options: dict[str, Any], drawn: Params, rule: str, weights: Params) -> Decoder:
    """Wider, then deeper by copies that write nothing; with a ramp by whole copies, and units that are all random."""
    first = "model.layers.0.self_attn"
    hidden, before = options.get("hidden_size", old.weights["model.norm.weight"].numel()), old.layers
    width = old.weights["model.norm.weight"].numel()
    units = old.weights["model.layers.0.mlp.gate_proj.weight"].shape[0]
    ffn = options.get("ffn_hidden_size", units)
    size = old.weights[f"{first}.q_proj.weight"].shape[0] // old.heads
    groups = old.weights[f"{first}.k_proj.weight"].shape[0] // size
    share, heads = old.heads // groups, options.get("num_attention_heads", old.heads)
    order = [layer % before for layer in range(options.get("num_layers", before))]
    ramp = Ramp(options["ramp_steps"], units, before) if options.get("ramp_steps") else None

    def silent(name: str) -> bool:
        writes = ".layers." in name and ("o_proj" in name or "down_proj" in name)
        return ramp is None and writes and int(name.split(".")[2]) >= before

    def widened(params: Params) -> Params:
        params = wider(in_order(params, order), hidden, ffn, drawn, size, (heads // share, share))
        for name, tensor in params.items():
            if silent(name):
                params[name] = torch.zeros_like(tensor)
            elif ramp is not None and "down_proj" in name:
                params[name] = torch.cat([tensor[:, :units], drawn[name][:, units:]], dim=1)
        return params

    new = Decoder(widened(weights), heads, old.epsilon * width / hidden, ramp=ramp)
    new.average = None if old.average is None else widened(old.average)
    qk_norm = f"{first}.q_norm.weight" in old.weights
    for target, source, power in ((new.exp_avg, old.exp_avg, 1), (new.exp_avg_sq, old.exp_avg_sq, 2)):
        for name, moment in in_order(source, order).items():
            whole = torch.zeros_like(new.weights[name])
            if rule == "seeded" and power == 2:
                whole += moment.mean()
            if not silent(name):
                smaller = name.split(".")[-2] in ("input_layernorm", "post_attention_layernorm", "norm")
                smaller = smaller or (qk_norm and name.split(".")[-2] in ("q_proj", "k_proj"))
                factor = (hidden / width) ** (power / 2) if smaller and rule != "copy" else 1.0
                whole[tuple(slice(length) for length in moment.shape)] = moment * factor
            target[name] = whole
    return new


def _compound_grow(
    old: Decoder, options: dict[str, Any], number: int, seed: int, rule: str, weights: Params
) -> Decoder:
    """Every unit k times; copies of what it passes on differ by noise that sums to zero."""
    k = options["factor"]

    def split(params: Params) -> Params:
        grown = split_units(params, k)
        for name, tensor in grown.items():
            if name.endswith("down_proj.weight") and options["noise"]:
                stream = named_generator(seed, f"{name} of stage {number}, noise", torch.device("cpu"))
                noise = torch.randn(tensor.shape, generator=stream).to(tensor) * options["noise"]
                by_copy = noise.view(len(noise), k, -1)
                noise = (by_copy - by_copy.mean(1, keepdim=True)).view_as(tensor)
                grown[name] = tensor + noise * tensor.pow(2).mean().sqrt()
        return grown

    new = Decoder(split(weights), old.heads, old.epsilon)
    new.average = None if old.average is None else split(old.average)
    for target, source, power in ((new.exp_avg, old.exp_avg, 1), (new.exp_avg_sq, old.exp_avg_sq, 2)):
        for name, moment in source.items():
            module = name.split(".")[-2]
            if module in ("gate_proj", "up_proj"):
                target[name] = torch.cat([moment / (1 if rule == "copy" else k**power)] * k)
            else:
                target[name] = torch.cat([moment] * k, dim=1) if module == "down_proj" else moment
    return new


def learning_rate(step: int, optim: dict[str, Any], last: int, stages: list[StageValues]) -> float:
    """Of step ``step``, from 1: linear warm-up, half a cosine down to min_lr, and the policies of the stages begun."""
    place, factor = float(step), 1.0
    for stage in stages:
        first = stage["until_steps"]
        policy, _, count = stage["lr_policy"].partition("(")
        number = int(count.strip(")") or 0)
        if step <= first:
            break
        if policy == "rewarm":  # on the curve that the stage before was on
            factor = min(1.0, (step - first) / number)
        elif policy == "rewind":
            place, factor = number + (step - first) * (last - number) / (last - first), 1.0
        else:
            assert policy == "continue", policy
    warmup, top, bottom = optim["lr_warmup_iters"], optim["lr"], optim["min_lr"]
    if place <= warmup:
        return factor * top * place / warmup
    passed = min(1.0, (place - warmup) / (last - warmup))
    return factor * (bottom + (top - bottom) * (1 + math.cos(math.pi * passed)) / 2)


def train(
    initial: Params,
    model: dict[str, Any],
    stages: list[StageValues],
    optim: dict[str, Any],
    samples: tuple[Tensor, Tensor],
    draw: Draw,
    seed: int,
    ema_decay: float = 0.0,
) -> list[tuple[float, float, float]]:
    """(loss, norm of the gradient, learning rate) of every step.

    Args:
        model: heads and epsilon of the first stage.
        samples: tokens and labels [steps, sequences, T].
        draw: initial values of the model of stage i, for i > 0.
    """
    weights = {name: tensor.double() for name, tensor in initial.items()}
    decoder = Decoder(weights, model["num_attention_heads"], model["layernorm_epsilon"])
    decoder.average = dict(weights) if ema_decay else None
    found, last = [], len(samples[0])
    for step in range(1, last + 1):
        for number, stage in enumerate(stages, start=1):
            if stage["until_steps"] == step - 1:
                drawn = {name: tensor.double() for name, tensor in draw(number).items()}
                decoder = grow(decoder, stage, number, drawn, seed)
        lr = learning_rate(step, optim, last, stages)
        found.append((*decoder.train_step(samples[0][step - 1], samples[1][step - 1], lr, ema_decay), lr))
    return found
