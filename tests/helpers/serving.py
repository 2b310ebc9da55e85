"""Models in the form for serving, and runtimes with a cache of their own as their sources read.

A runtime packs the new tokens of several requests into one sequence, keeps keys and values by the index of the module
that attends, and allots every index the same heads. Imports neither Megatron-Core nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_sgt.export.hf.configuration_sgt_serving import SGTServingConfig
from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from megatron_sgt.export.hf.modeling_sgt_serving import SGTServingForCausalLM
from tests.helpers.hf_models import hf_model, random_ids, reference_logits

_EIGHT: dict[str, Any] = {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 3}
KINDS: dict[str, dict[str, Any]] = {
    "two_of_eight_heads": {"num_key_value_heads": 2, "sgt_loops": {"1": {"heads": [1, 6], "depth": 1}}},
    "depths_qk_norm": {
        "num_key_value_heads": 4, "qk_norm": True,
        "sgt_loops": {"2": {"heads": [0, 3], "depth": 3}, "0": {"heads": [2, 5], "depth": 2}},
    },
    "all_heads_tied_biases": {
        "tie_word_embeddings": True, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
        "sgt_loops": {"1": {"heads": list(range(8)), "depth": 2}},
    },
    "olmo2": {
        "num_key_value_heads": 2, "norm_position": "output", "qk_norm": True, "qk_norm_over": "all",
        "sgt_loops": {"1": {"heads": [1, 6], "depth": 2}},
    },
    "block_loop": {"num_key_value_heads": 2, "sgt_loops": {"1": {"block_loops": 2}, "2": {"block_loops": 1}}},
    "block_and_heads_in_a_window": {
        "num_key_value_heads": 2,
        "sgt_loops": {
            "1": {"heads": [0, 1, 4], "depth": 1, "block_loops": 1},
            "0": {"heads": [3], "depth": 1, "other_gate": 0.4},
        },
    },
}  # fmt: skip


def standard_model(kind: str, **changes: Any) -> SGTForCausalLM:
    """One of KINDS in the standard form, in fp64."""
    return hf_model("never_grown", **{**_EIGHT, **KINDS[kind], **changes}).double()


def for_serving(model: SGTForCausalLM) -> SGTServingForCausalLM:
    """The same weights in the form for serving."""
    values = model.config.to_dict()
    layers = values.pop("num_hidden_layers")
    values = {name: value for name, value in values.items() if name not in ("model_type", "auto_map", "architectures")}
    found = SGTServingForCausalLM(SGTServingConfig(sgt_num_layers=layers, **values)).to(model.dtype).eval()
    found.load_state_dict(model.state_dict())
    return found


TOKENS = random_ids(2, 16)


@dataclass
class Pair:
    """One kind in both forms, and the reference's logits of TOKENS; with attention by sdpa."""

    standard: SGTForCausalLM
    serving: SGTServingForCausalLM
    expected: Tensor


@cache
def _pair(kind: str) -> Pair:
    torch.set_default_dtype(torch.float64)
    try:
        model = standard_model(kind)
        return Pair(model, for_serving(model), reference_logits(model, TOKENS).detach())
    finally:
        torch.set_default_dtype(torch.float32)


def pair_of(kind: str) -> Pair:
    """Made once per process."""
    found = _pair(kind)
    for model in (found.standard, found.serving):
        model.set_attn_implementation("sdpa")
    return found


class Requests:
    """What is in the one sequence of the present step: ``batch`` is [(request, its new tokens)]."""

    def __init__(self) -> None:
        self.batch: list[tuple[str, int]] = []


class OwnAttention(nn.Module):
    """A runtime's attention of one index: [all new tokens, heads · H] -> the same, over what it has seen.

    ``heads``, ``groups``: what the runtime has allotted. No parameters.
    """

    def __init__(self, heads: int, groups: int, size: int, requests: Requests) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.requests = heads, groups, size, requests
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lengths = [length for _, length in self.requests.batch]
        query = query.view(sum(lengths), self.heads, self.size)
        key, value = (t.view(sum(lengths), self.groups, self.size) for t in (key, value))
        out, first = [], 0
        for request, length in self.requests.batch:
            new = slice(first, first + length)
            old = self.seen.get(request, (key[:0], value[:0]))
            keys, values = self.seen[request] = (torch.cat([old[0], key[new]]), torch.cat([old[1], value[new]]))
            repeat = self.heads // self.groups
            keys, values = (t.repeat_interleave(repeat, dim=1) for t in (keys, values))
            scores = torch.einsum("snh,tnh->nst", query[new], keys) * self.size**-0.5
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - length)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            out.append(torch.einsum("nst,tnh->snh", weights, values).flatten(1))
            first += length
        return torch.cat(out)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """[1, heads, S, H] -> [S, heads · H], as vLLM and SGLang do."""
    return [t.transpose(1, 2).reshape(t.shape[2], -1) for t in tensors]


def vllm(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """vLLM 0.33's: the attention hangs on the module."""
    return module.attn(*_flat(query, key, value)), None


def by_index(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, attention_instances: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SGLang 0.5.23's, and older vLLM's: by the module's index, among the model's arguments."""
    return attention_instances[module.layer_idx](*_flat(query, key, value)), None


@contextmanager
def registered(name: str, function: Any) -> Iterator[str]:
    """Attention ``function`` under ``name``, as a runtime registers it when it is imported."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    try:
        yield name
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]


class Runtime:
    """Serves a model: ``step`` runs the new tokens of some requests and returns their logits.

    kind: "vllm", or "sglang" for attention by index.
    """

    def __init__(self, model: Any, kind: str) -> None:
        config = model.config
        self.model, self.kind, self.requests = model, kind, Requests()
        self.length: dict[str, int] = {}
        shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.instances = {n: OwnAttention(*shape, self.requests) for n in range(config.num_hidden_layers)}
        config._attn_implementation = kind
        if kind == "vllm":
            for module in list(model.modules()):
                if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups"):
                    module.attn = self.instances[module.layer_idx]

    def step(self, **tokens: Tensor) -> dict[str, Tensor]:
        """tokens: request -> its new ids [S] -> logits [S, vocabulary]."""
        self.requests.batch = [(request, len(ids)) for request, ids in tokens.items()]
        seen = {request: self.length.get(request, 0) for request in tokens}
        positions = torch.cat([torch.arange(len(ids)) + seen[request] for request, ids in tokens.items()])
        more = {} if self.kind == "vllm" else {"attention_instances": self.instances, "forward_batch": self.requests}
        with registered(self.kind, vllm if self.kind == "vllm" else by_index), torch.no_grad():
            ids = torch.cat(list(tokens.values()))[None]
            hidden = self.model.model(
                input_ids=ids, position_ids=positions[None], use_cache=False, return_dict=False, **more
            )[0][0]
        self.length |= {request: seen[request] + len(ids) for request, ids in tokens.items()}
        logits = self.model.lm_head(hidden).split([len(ids) for ids in tokens.values()])
        return dict(zip(tokens, logits, strict=True))


def served(model: Any, kind: str, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of two texts [S]: prefill in chunks, then decoding, each with the other in the same step."""
    runtime = Runtime(model, kind)
    parts = [runtime.step(one=one[:5]), runtime.step(one=one[5:6], other=other[:3])]
    parts += [runtime.step(other=other[3:9], one=one[6:10])]
    for n in range(10, len(one)):
        parts.append(runtime.step(one=one[n : n + 1], other=other[n - 1 : n]))
    parts.append(runtime.step(other=other[len(one) - 1 :]))
    return tuple(torch.cat([part[name] for part in parts if name in part]) for name in ("one", "other"))  # type: ignore[return-value]
