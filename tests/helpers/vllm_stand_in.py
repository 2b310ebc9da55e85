"""The layers of vLLM 0.33 that the plugin uses, in plain PyTorch, under vLLM's module names and call signatures.

Ranks of tensor parallelism are threads, whose all-reduce meets at a barrier. An attention keeps the keys and values of
each request under its own name; a name that another one has, or that does not hold exactly one layer index, is refused
as vLLM refuses it. Shapes: T tokens of all requests of a step.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HERE = threading.local()  # of a rank: rank, ranks, stage, stages, meeting, context, lengths


class Meeting:
    """Where the ranks of a tensor-parallel group add their parts."""

    def __init__(self, ranks: int) -> None:
        self.parts: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def total(self, rank: int, part: Tensor) -> Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        total = sum(self.parts)
        self.barrier.wait()
        return total


def tensor_model_parallel_all_reduce(part: Tensor) -> Tensor:
    return part if _HERE.ranks == 1 else _HERE.meeting.total(_HERE.rank, part)


def _parameter(*shape: int, load: Callable[..., None]) -> nn.Parameter:
    parameter = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


def _share(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    assert tensor.shape[dim] % ranks == 0
    return tensor.chunk(ranks, dim)[rank]


class ColumnParallelLinear(nn.Module):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, gather_output: bool = False,
        skip_bias_add: bool = False, params_dtype: Any = None, quant_config: Any = None, prefix: str = "", *,
        return_bias: bool = True, disable_tp: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        rows = self.rows(output_size)
        self.weight = _parameter(rows, input_size, load=self.load)
        self.bias = _parameter(rows, load=self.load) if bias else None

    def rows(self, output_size: int) -> int:
        return output_size // _HERE.ranks

    def load(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        parameter.data.copy_(_share(tensor, 0, _HERE.rank, _HERE.ranks))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = True, **kwargs: Any) -> None:
        self.sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), bias, **kwargs)

    def load(self, parameter: nn.Parameter, tensor: Tensor, shard: int = -1) -> None:  # type: ignore[override]
        start = sum(self.sizes[:shard]) // _HERE.ranks
        part = _share(tensor, 0, _HERE.rank, _HERE.ranks)
        parameter.data[start : start + len(part)].copy_(part)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int | None = None,
        bias: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        groups = total_num_kv_heads or total_num_heads
        ranks = _HERE.ranks
        self.replicas = max(1, ranks // groups)
        self.sizes = {
            "q": total_num_heads // ranks * head_size,
            "k": max(1, groups // ranks) * head_size,
            "v": max(1, groups // ranks) * head_size,
        }
        super().__init__(hidden_size, 0, bias, **kwargs)

    def rows(self, output_size: int) -> int:
        return sum(self.sizes.values())

    def load(self, parameter: nn.Parameter, tensor: Tensor, shard: str = "") -> None:  # type: ignore[override]
        start = {"q": 0, "k": self.sizes["q"], "v": self.sizes["q"] + self.sizes["k"]}[shard]
        rank = _HERE.rank if shard == "q" else _HERE.rank // self.replicas
        size = self.sizes[shard]
        parameter.data[start : start + size].copy_(tensor[rank * size : (rank + 1) * size])


class RowParallelLinear(nn.Module):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, input_is_parallel: bool = True,
        skip_bias_add: bool = False, params_dtype: Any = None, reduce_results: bool = True, quant_config: Any = None,
        prefix: str = "", *, return_bias: bool = True, disable_tp: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = _parameter(output_size, input_size // _HERE.ranks, load=self.load)
        self.bias = _parameter(output_size, load=default_weight_loader) if bias else None

    def load(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        parameter.data.copy_(_share(tensor, 1, _HERE.rank, _HERE.ranks))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        bias = self.bias if _HERE.rank == 0 else None
        return tensor_model_parallel_all_reduce(F.linear(x, self.weight, bias)), None


def default_weight_loader(parameter: nn.Parameter, tensor: Tensor) -> None:
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), torch.nan), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, alibi_slopes: Any = None,
        use_alibi_sqrt: Any = None, cache_config: Any = None, quant_config: Any = None, logits_soft_cap: Any = None,
        per_layer_sliding_window: int | None = None, prefix: str = "", **extra_impl_args: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.groups, self.size, self.scale = num_heads, num_kv_heads or num_heads, head_size, scale
        assert self.heads % self.groups == 0
        (index,) = [int(word) for word in prefix.split(".") if word.isdigit()]
        if prefix in _HERE.context or index in [layer.index for layer in _HERE.context.values()]:
            raise ValueError(f"Duplicate layer name: {prefix}")
        _HERE.context[prefix] = self
        self.index = index
        self.requests: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.view(-1, self.heads, self.size)
        key, value = key.view(-1, self.groups, self.size), value.view(-1, self.groups, self.size)
        outputs, start = [], 0
        for request, length in _HERE.lengths.items():
            rows = slice(start, start + length)
            outputs.append(self.attend(request, query[rows], key[rows], value[rows]))
            start += length
        return torch.cat(outputs).view(-1, self.heads * self.size)

    def attend(self, request: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if request in self.requests:
            before = self.requests[request]
            key, value = torch.cat((before[0], key)), torch.cat((before[1], value))
        self.requests[request] = (key, value)
        key, value = (t.repeat_interleave(self.heads // self.groups, 1).transpose(0, 1) for t in (key, value))
        hidden = torch.ones(len(query), key.shape[1], dtype=torch.bool).triu(key.shape[1] - len(query) + 1)
        scores = query.transpose(0, 1) @ key.transpose(1, 2) * self.scale
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1)


class VocabParallelEmbedding(nn.Module):
    """Whole on every rank: how rows are divided is not the plugin's affair."""

    def __init__(self, num_embeddings: int, embedding_dim: int, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.weight = _parameter(num_embeddings, embedding_dim, load=default_weight_loader)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
        return embed_tokens


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__()

    def forward(self, head: VocabParallelEmbedding, x: Tensor) -> Tensor:
        return F.linear(x, head.weight)


class _Rotary(nn.Module):
    def __init__(self, size: int, parameters: dict[str, Any]) -> None:
        super().__init__()
        assert parameters["rope_type"] == "default"
        self.size, self.theta = size, parameters["rope_theta"]

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].double() / self.theta ** (torch.arange(0, self.size, 2).double() / self.size)
        cos, sin = angles.cos()[:, None].to(query.dtype), angles.sin()[:, None].to(query.dtype)

        def rotated(x: Tensor) -> Tensor:
            a, b = x.view(len(x), -1, self.size).chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(1)

        return rotated(query), rotated(key)


def get_rope(
    head_size: int, max_position: int, is_neox_style: bool = True, rope_parameters: dict[str, Any] | None = None
) -> nn.Module:
    return _Rotary(head_size, rope_parameters or {})


class _Activation(nn.Module):
    def __init__(self, name: str, gated: bool) -> None:
        super().__init__()
        self.function, self.gated = getattr(F, name), gated

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.function(x)
        gate, up = x.chunk(2, dim=-1)
        return self.function(gate) * up


class IntermediateTensors(dict):
    """Tensors from one pipeline stage to the next."""


class PPMissingLayer(nn.Identity):
    pass


def make_layers(count: int, layer: Callable[..., nn.Module], prefix: str) -> tuple[int, int, nn.ModuleList]:
    size = count // _HERE.stages
    start, end = _HERE.stage * size, (_HERE.stage + 1) * size
    return (
        start,
        end,
        nn.ModuleList(layer(prefix=f"{prefix}.{n}") if start <= n < end else PPMissingLayer() for n in range(count)),
    )


def is_pp_missing_parameter(name: str, model: nn.Module) -> bool:
    missing = [at for at, module in model.named_modules() if isinstance(module, PPMissingLayer)]
    return any(name.startswith(f"{at}.") for at in missing)


def _group() -> Any:
    return SimpleNamespace(is_first_rank=_HERE.stage == 0, is_last_rank=_HERE.stage == _HERE.stages - 1)


class _Interface:
    pass


_MODULES: dict[str, dict[str, Any]] = {
    "vllm.compilation.decorators": {"support_torch_compile": lambda dynamic_arg_dims: lambda cls: cls},
    "vllm.config": {"VllmConfig": SimpleNamespace},
    "vllm.distributed": {
        "get_pp_group": _group,
        "get_tensor_model_parallel_rank": lambda: _HERE.rank,
        "get_tensor_model_parallel_world_size": lambda: _HERE.ranks,
        "tensor_model_parallel_all_reduce": tensor_model_parallel_all_reduce,
    },
    "vllm.model_executor.layers.activation": {
        "get_act_fn": lambda name: _Activation(name, gated=False),
        "get_act_and_mul_fn": lambda name: _Activation(name, gated=True),
    },
    "vllm.model_executor.layers.attention": {"Attention": Attention},
    "vllm.model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
    "vllm.model_executor.layers.linear": {
        one.__name__: one
        for one in (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
    },
    "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    "vllm.model_executor.layers.rotary_embedding": {"get_rope": get_rope},
    "vllm.model_executor.layers.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead, "VocabParallelEmbedding": VocabParallelEmbedding,
    },
    "vllm.model_executor.model_loader.weight_utils": {"default_weight_loader": default_weight_loader},
    "vllm.model_executor.models.interfaces": {
        name: type(name, (_Interface,), {}) for name in ("SupportsLoRA", "SupportsPP", "SupportsQuant")
    },
    "vllm.model_executor.models.utils": {
        "PPMissingLayer": PPMissingLayer,
        "is_pp_missing_parameter": is_pp_missing_parameter,
        "make_empty_intermediate_tensors_factory": lambda names, size: None,
        "make_layers": make_layers,
        "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
    },
    "vllm.sequence": {"IntermediateTensors": IntermediateTensors},
}  # fmt: skip


@contextmanager
def plugin_model() -> Iterator[ModuleType]:
    """``vllm_sgt.model``, imported with the stand-in in vLLM's place."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"}
    for name, values in _MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(sys.modules[name]).update(values)
    sys.modules.pop("vllm_sgt.model", None)
    try:
        yield importlib.import_module("vllm_sgt.model")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name == "vllm_sgt.model"]:
            del sys.modules[name]
        sys.modules.update(hidden)


class Engine:
    """One model on ``ranks`` threads and ``stages`` pipeline stages, which are one after the other on each thread."""

    def __init__(
        self, module: ModuleType, config: Any, weights: Iterable[tuple[str, Tensor]], ranks: int = 1, stages: int = 1,
        **settings: Any,
    ) -> None:  # fmt: skip
        model_config = SimpleNamespace(hf_config=config)
        self.vllm_config = SimpleNamespace(
            **({"model_config": model_config, "cache_config": None, "quant_config": None} | settings)
        )
        self.ranks, self.stages = ranks, stages
        self.meeting = Meeting(ranks)
        self.module, self.weights = module, list(weights)
        self.dtype = self.weights[0][1].dtype
        self.models: dict[tuple[int, int], Any] = {}
        self.loaded: dict[tuple[int, int], set[str]] = {}
        self.contexts: list[dict[str, Attention]] = [{} for _ in range(ranks)]
        self.on_ranks(self._build)

    def on_ranks(self, work: Callable[[], Any]) -> list[Any]:
        def run(rank: int) -> Any:
            _HERE.rank, _HERE.ranks, _HERE.stages, _HERE.meeting = rank, self.ranks, self.stages, self.meeting
            _HERE.context = self.contexts[rank]
            with torch.no_grad():
                return work()

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(run, range(self.ranks)))

    def _build(self) -> None:
        for stage in range(self.stages):
            _HERE.stage = stage
            model = self.module.SGTForCausalLM(vllm_config=self.vllm_config).to(self.dtype)
            self.models[_HERE.rank, stage] = model
            self.loaded[_HERE.rank, stage] = model.load_weights(iter(self.weights))

    def step(self, tokens: dict[int, tuple[Tensor, int]]) -> Tensor:
        """Logits [T, vocabulary] of new tokens: request -> (ids, position of the first). All ranks must agree."""
        ids = torch.cat([new for new, _ in tokens.values()])
        positions = torch.cat([torch.arange(len(new)) + first for new, first in tokens.values()])

        def work() -> Tensor:
            _HERE.lengths = {request: len(new) for request, (new, _) in tokens.items()}
            between = None
            for stage in range(self.stages):
                _HERE.stage = stage
                model = self.models[_HERE.rank, stage]
                between = model(ids, positions, between)
            return model.compute_logits(between)

        one, *others = self.on_ranks(work)
        assert all(torch.equal(one, other) for other in others)
        return one
