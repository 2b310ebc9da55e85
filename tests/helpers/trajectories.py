"""Trajectory files in the format of tests/golden/a.safetensors: read, write, and make new ones.

New ones come from the reference, with settings that the golden file does not have. Settings are those of
`reference_sgt`, with these optional keys under "model", Megatron's names for what the weights imply:
num_query_groups, kv_channels, qk_layernorm, qk_layernorm_over, norm_position, untie_embeddings_and_output_weights.
With a section "data" the tokens come in documents, whose "document_starts" and "num_tokens" are in the file.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.reference_sgt import Settings, run_trajectory

GOLDEN = Path(__file__).parents[1] / "golden" / "a.safetensors"

BASE: Settings = {
    "model": {
        "num_layers": 5,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 64,
        "seq_length": 32,
        "norm_eps": 1e-6,
        "rope_theta": 10000,
    },
    "growth": {
        "top_k_layers": 3,
        "max_selected_layers": 3,
        "max_loop_depth": 1,
        "num_keep_heads": 2,
        "window_size": 4,
        "first_selection_step": 4,
        "decay_type": "linear",
        "ema_decay": 0.5,
        "exclude_layers": [0],
    },
    "optim": {
        "lr": 3e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
        "schedule": "constant",
    },
    "steps": 24,
    "global_batch": 4,
    "micro_batch": 2,
}
"""A small run: three selections at most, then fixed, within seconds."""

VARIANTS: dict[str, Settings] = {
    "depth2_cosine": {"growth": {"max_loop_depth": 2, "decay_type": "cosine"}, "steps": 32},
    "depth3_exponential": {"growth": {"max_loop_depth": 3, "decay_type": "exponential"}, "steps": 44},
    "grouped_query_qk_norm": {"model": {"num_query_groups": 2, "qk_layernorm": True}},
    "olmo2": {
        "model": {
            "num_query_groups": 2,
            "qk_layernorm": True,
            "qk_layernorm_over": "all",
            "norm_position": "output",
        },
        "optim": {"eps": 1e-6},  # at 1e-8 some gradients near 0 make 2e-5 of loss out of the noise of fp32
        "steps": 14,
    },
    "eight_heads_keep_three": {"model": {"num_attention_heads": 8}, "growth": {"num_keep_heads": 3}},
    "wide_heads_tied": {"model": {"kv_channels": 16, "untie_embeddings_and_output_weights": False}},
    "stopped_inside_a_window": {"growth": {"max_loop_depth": 2, "ema_decay": 0.9}, "steps": 10},
    "single_layer_no_smoothing": {"growth": {"top_k_layers": 1, "max_selected_layers": 1, "ema_decay": 0.0}},
    "shallow_to_deep": {"growth": {"direction": "shallow_to_deep"}},
    "lowest_heads": {"growth": {"head_choice": "lowest"}},
    "random_heads": {"growth": {"head_choice": "random", "seed": 7}},
    "all_heads": {"growth": {"head_choice": "all"}},
    "entropy_after_fixed": {"growth": {"entropy_after_fixed": True, "max_loop_depth": 2}, "steps": 36},
    "block_loop": {"growth": {"method": "block_loop", "block_loop_layers": [2, 3], "block_loop_count": 1}},
    "vanilla": {"growth": {"method": "vanilla"}},
}
"""What each variant changes in BASE, section by section."""


def settings_of(variant: str) -> Settings:
    """BASE with the changes of one of VARIANTS, named after it."""
    settings = {"name": variant, **deepcopy(BASE)}
    for key, value in VARIANTS[variant].items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    return settings


def read_trajectory(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata (settings and "events") of a trajectory file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118


def write_trajectory(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """The inverse of read_trajectory."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"meta": json.dumps(metadata)})


def init_weights(model: Settings, seed: int) -> dict[str, Tensor]:
    """Random weights under Hugging Face names; wide q and k projections, so that heads differ in entropy."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, heads = model["hidden_size"], model["ffn_hidden_size"], model["num_attention_heads"]
    size = model.get("kv_channels", hidden // heads)
    groups = model.get("num_query_groups", heads)

    def matrix(rows: int, columns: int, std: float = 0.05) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    weights = {"model.embed_tokens.weight": matrix(model["vocab_size"], hidden)}
    for n in range(model["num_layers"]):
        layer = {
            "self_attn.q_proj": matrix(heads * size, hidden, 0.25),
            "self_attn.k_proj": matrix(groups * size, hidden, 0.25),
            "self_attn.v_proj": matrix(groups * size, hidden),
            "self_attn.o_proj": matrix(hidden, heads * size),
            "mlp.gate_proj": matrix(ffn, hidden),
            "mlp.up_proj": matrix(ffn, hidden),
            "mlp.down_proj": matrix(hidden, ffn),
        }
        other = "post_feedforward" if model.get("norm_position", "input") == "output" else "input"
        layer |= {f"{name}_layernorm": 1.0 + matrix(1, hidden)[0] for name in (other, "post_attention")}
        if model.get("qk_layernorm", False):
            over_all = model.get("qk_layernorm_over", "head") == "all"
            sizes = (heads * size, groups * size) if over_all else (size, size)
            layer |= {f"self_attn.{x}_norm": 1.0 + matrix(1, n, 0.3)[0] for x, n in zip("qk", sizes, strict=True)}
        weights |= {f"model.layers.{n}.{name}.weight": w for name, w in layer.items()}
    weights["model.norm.weight"] = 1.0 + matrix(1, hidden)[0]
    if model.get("untie_embeddings_and_output_weights", True):
        weights["lm_head.weight"] = matrix(model["vocab_size"], hidden)
    return weights


def random_tokens(shape: tuple[int, ...], vocab_size: int, seed: int) -> Tensor:
    """Tokens [..., T] (int16) of a chain in which each token has four successors: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(vocab_size, (vocab_size, 4), generator=generator)
    tokens = torch.empty(shape, dtype=torch.int64)
    tokens[..., 0] = torch.randint(vocab_size, shape[:-1], generator=generator)
    for t in range(1, shape[-1]):
        pick = torch.randint(4, shape[:-1], generator=generator)
        tokens[..., t] = successors[tokens[..., t - 1], pick]
    return tokens.to(torch.int16)


def random_documents(shape: tuple[int, ...], seed: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Starts [..., T] (int16) of documents of uneven lengths, one token and whole sequences among them; and how many
    tokens [...] are before the padding, with ``padded`` not always all."""
    generator = torch.Generator().manual_seed(seed)
    length = shape[-1]
    often = torch.rand(shape[:-1], generator=generator).square()[..., None] * 0.5  # of a begin, in a sequence
    begins = torch.rand(shape, generator=generator) < often
    begins[..., 0] = True
    kept = torch.randint(length // 2, 3 * length // 2, shape[:-1], generator=generator).clamp(max=length)
    tokens = kept if padded else torch.full_like(kept, length)
    place = torch.arange(length)
    begins = (begins & (place < tokens[..., None])) | (place == tokens[..., None])
    return torch.where(begins, place, 0).cummax(-1).values.to(torch.int16), tokens


def decision_margin(ema_entropy: Tensor, metadata: dict[str, Any]) -> float:
    """How far the closest decision was from another outcome, as a difference of EMA entropies.

    The noise of fp32 moves an EMA entropy by some 1e-6: far below the margin, events must be reproduced.
    """
    growth = metadata["growth"]
    margin = float("inf")
    for event in metadata["events"]:
        ema = ema_entropy[event["step"] - 1]
        scores = ema.mean(1)
        ranked = sorted((float(s) for n, s in enumerate(scores) if n not in growth["exclude_layers"]), reverse=True)
        if growth["top_k_layers"] < len(ranked):
            margin = min(margin, ranked[growth["top_k_layers"] - 1] - ranked[growth["top_k_layers"]])
        ranks_heads = growth.get("head_choice", "highest") in ("highest", "lowest")
        if event["action"] in ("first_selection", "select_new_layer") and ranks_heads:
            kept = event["kept_heads"][str(event["layer"])]
            others = [h for h in range(ema.shape[1]) if h not in kept]
            gaps = (ema[event["layer"], kept][:, None] - ema[event["layer"], others]).abs()
            margin = min(margin, float(gaps.min()) if others else margin)
    return margin


def make_trajectory(
    settings: Settings, seed: int = 0, min_margin: float = 1e-4
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A new trajectory from the reference: (tensors, metadata) as read_trajectory returns them.

    Raises ValueError when a growth decision hangs on less than min_margin: take another seed.
    """
    model = settings["model"]
    vocab_size, length = model["vocab_size"], model["seq_length"]
    init = init_weights(model, seed)
    # One draw, so that the probe follows the chain that the training tokens follow.
    drawn = random_tokens((settings["steps"] * settings["global_batch"] + 2, length), vocab_size, seed + 1)
    tokens, probe_tokens = drawn[:-2].view(settings["steps"], settings["global_batch"], length), drawn[-2:]
    told = {}
    if data := settings.get("data"):
        starts, before = random_documents(tuple(tokens.shape), seed + 2, data.get("packing") == "best_fit")
        told = {"document_starts": starts, "num_tokens": before}
    documents = (told["document_starts"], told["num_tokens"]) if told else None
    result = run_trajectory(init, tokens, settings, probe_tokens, documents)
    metadata = {**deepcopy(settings), "events": result.pop("events")}
    margin = decision_margin(result["ema_entropy"], metadata)
    if margin < min_margin:
        raise ValueError(f"seed {seed}: a decision hangs on {margin:.1e} of entropy, less than {min_margin:.1e}")
    tensors = {f"init/{name}": w for name, w in init.items()}
    return {**tensors, **result, **told, "tokens": tokens, "probe_tokens": probe_tokens.clone()}, metadata
