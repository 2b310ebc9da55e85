"""The exported Sparse Growing Transformer as a native vLLM model.

Each attention pass of a layer is a vLLM ``Attention`` of its own, with keys and values of its own; all passes of a
layer share one QKV projection and one output projection, which are called as modules in every pass, so that
quantised and LoRA-wrapped ones serve the loops too. Gates multiply the heads before the output projection.

Shapes: T tokens of all requests of a step, D hidden, N query heads and G key/value groups of this rank, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import get_act_and_mul_fn, get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_sgt.passes import Pass, heads_of, kv_option, passes_of, real_layers
from vllm_sgt.settings import check, rope_parameters
from vllm_sgt.weights import stacked


def _norm(config: Any) -> nn.Module:
    if getattr(config, "normalization", "RMSNorm") == "LayerNorm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SGTHeadsNorm(nn.Module):
    """RMSNorm over all heads of all ranks together, of which this rank holds some; groups may be on several ranks."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.ranks, self.copies, self.eps = ranks, max(1, ranks // heads), eps
        self.width = heads * size * self.copies  # what all ranks hold
        self.weight = nn.Parameter(torch.ones(self.width // ranks))
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """This rank's part of the exported weight."""
        place = get_tensor_model_parallel_rank() // self.copies
        parameter.data.copy_(tensor[place * len(parameter) : (place + 1) * len(parameter)])

    def forward(self, x: Tensor) -> Tensor:
        """x [T, heads of this rank · size]."""
        wide = x.float()
        squares = wide.pow(2).sum(-1, keepdim=True)
        if self.ranks > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        return (wide * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype) * self.weight


class SGTPass(nn.Module):
    """One attention pass: which heads attend, and their keys and values. Has no parameters."""

    def __init__(self, one: Pass, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        ranks = get_tensor_model_parallel_world_size()
        self.heads = heads_of(
            one.gates, config.num_key_value_heads, kv_option(config), get_tensor_model_parallel_rank(), ranks
        )
        groups, total = len(self.heads.groups), max(1, config.num_key_value_heads // ranks)
        self.width = config.num_attention_heads // ranks // total * config.head_dim  # of a group's queries
        self.size = config.head_dim
        self.total = total
        gates = self.heads.gates
        self.register_buffer("gates", None if gates is None else torch.tensor(gates)[:, None], persistent=False)
        self.attn = Attention(
            groups * self.width // config.head_dim,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=groups,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, N · H], key and value [T, G · H] -> [T, N · H], 0 where a head does not attend."""
        if len(self.heads.groups) < self.total:
            query, key, value = (
                torch.cat([t[:, g * width : (g + 1) * width] for g in self.heads.groups], dim=-1)
                for t, width in ((query, self.width), (key, self.size), (value, self.size))
            )
        out = self.attn(query, key, value)
        if self.gates is not None:
            out = (out.unflatten(-1, (-1, self.size)) * self.gates).flatten(-2)
        if len(self.heads.groups) == self.total:
            return out
        parts = dict(zip(self.heads.groups, out.split(self.width, dim=-1), strict=True))
        zeros = torch.zeros_like(out[:, : self.width])
        return torch.cat([parts.get(g, zeros) for g in range(self.total)], dim=-1)


class SGTAttention(nn.Module):
    """The projections of a layer and its attention passes. ``runs``: the passes of each execution of the layer."""

    def __init__(self, runs: tuple[tuple[Pass, ...], ...], vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.query_size = config.num_attention_heads // ranks * self.head_dim
        self.key_size = max(1, config.num_key_value_heads // ranks) * self.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=getattr(config, "attention_bias", False),
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=getattr(config, "attention_out_bias", False),
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=rope_parameters(config)
        )
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.norms_all_heads = getattr(config, "qk_norm_over", "head") == "all"
        if getattr(config, "qk_norm", False) and self.norms_all_heads:
            self.q_norm = SGTHeadsNorm(config.num_attention_heads, self.head_dim, config.rms_norm_eps)
            self.k_norm = SGTHeadsNorm(config.num_key_value_heads, self.head_dim, config.rms_norm_eps)
        elif getattr(config, "qk_norm", False):
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        # vLLM reads a layer's index from the name: each pass has that of its place among all passes.
        root = prefix.rpartition(".layers.")[0]
        self.passes = nn.ModuleList(
            nn.ModuleList(SGTPass(one, vllm_config, f"{root}.layers.{one.index}.self_attn") for one in run)
            for run in runs
        )

    def forward(self, positions: Tensor, x: Tensor, one: nn.Module) -> Tensor:
        """positions [T], x [T, D] -> [T, D]. ``one``: which of the passes."""
        qkv, _ = self.qkv_proj(x)
        query, key, value = qkv.split([self.query_size, self.key_size, self.key_size], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        query, key = self.rotary_emb(positions, query, key)
        out, _ = self.o_proj(one(query, key, value))
        return out

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.norms_all_heads:
            return norm(x)
        return norm(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)


class SGTMLP(nn.Module):
    """down(act(gate(x)) · up(x)), or without gate down(act(up(x)))."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gated = getattr(config, "gated_mlp", True)
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden, [inner] * 2, bias=bias, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
            )
        else:
            self.up_proj = ColumnParallelLinear(
                hidden, inner, bias=bias, quant_config=quant, prefix=f"{prefix}.up_proj"
            )
        self.down_proj = RowParallelLinear(inner, hidden, bias=bias, quant_config=quant, prefix=f"{prefix}.down_proj")
        self.act_fn = get_act_and_mul_fn(config.hidden_act) if self.gated else get_act_fn(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D]."""
        inner, _ = self.gate_up_proj(x) if self.gated else self.up_proj(x)
        out, _ = self.down_proj(self.act_fn(inner))
        return out


class SGTDecoderLayer(nn.Module):
    """Attention, its loops, MLP; all of it once more for each block loop."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        runs = passes_of(config, int(prefix.rpartition(".")[2]))
        self.self_attn = SGTAttention(runs, vllm_config, f"{prefix}.self_attn")
        self.mlp = SGTMLP(vllm_config, f"{prefix}.mlp")
        self.norms_outputs = getattr(config, "norm_position", "input") == "output"
        self.post_attention_layernorm = _norm(config)
        if self.norms_outputs:  # under OLMo-2's names, else Llama's
            self.post_feedforward_layernorm = _norm(config)
        else:
            self.input_layernorm = _norm(config)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """positions [T], x [T, D]."""
        runs: Any = self.self_attn.passes
        for run in runs:
            for one in run:
                if self.norms_outputs:
                    x = x + self.post_attention_layernorm(self.self_attn(positions, x, one))
                else:
                    x = x + self.self_attn(positions, self.input_layernorm(x), one)
            if self.norms_outputs:
                x = x + self.post_feedforward_layernorm(self.mlp(x))
            else:
                x = x + self.mlp(self.post_attention_layernorm(x))
        return x


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class SGTModel(nn.Module):
    """The decoder without its output projection; of a pipeline stage, its layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        check(config, vllm_config, get_tensor_model_parallel_world_size())
        self.config = config
        stage = get_pp_group()
        if stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            real_layers(config), lambda prefix: SGTDecoderLayer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = _norm(config) if stage.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """input_ids and positions [T] -> [T, D]."""
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            x = inputs_embeds
        else:
            assert input_ids is not None
            x = self.embed_input_ids(input_ids)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(positions, x)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)


class SGTForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsQuant):
    """The language model, of either exported form."""

    packed_modules_mapping = {  # noqa: RUF012 (as in vLLM)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {  # noqa: RUF012
        "embed_tokens": "input_embeddings",
        "lm_head": "output_embeddings",
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = SGTModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] -> [T, D]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """As ``SGTModel``."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """hidden_states [T, D] -> [T, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the exported tensors; returns the names of the parameters that they went into.

        Raises:
            ValueError: a tensor that this model does not have.
        """
        parameters = dict(self.named_parameters(remove_duplicate=False))
        loaded: set[str] = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if is_pp_missing_parameter(name, self):
                continue
            own, shard = stacked(name, gated=getattr(self.config, "gated_mlp", True))
            if own not in parameters:
                raise ValueError(f"the folder has a tensor {name}, and this model none of that name")
            parameter = parameters[own]
            load: Callable[..., None] = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor) if shard is None else load(parameter, tensor, shard)
            loaded.add(own)
        return loaded
