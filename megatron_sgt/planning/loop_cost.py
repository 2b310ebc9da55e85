"""What a sparse loop pass costs a tensor-parallel rank, and which way of looping is cheaper. Pure.

Two ways (see head_loop.py and balanced_loop.py): "owner", each rank loops the kept heads that it owns, and
"balanced", each rank loops all kept heads for its share of the tokens. h kept heads on g key/value groups of
size H, S·B tokens of width D, t ranks. Operations of a pass on rank r, as torch's counter counts them (a causal
product as a full one), forward; the backward pass has twice the linear and 2.5 times the attention operations:

    owner      linear 2·S·B·D·(2h + 2g)·H of its own heads          attention 4·S²·B·h·H of its own heads
    balanced   linear 2·S·B·D·(2h + 2g)·H / t                       attention 4·(S/t)·(r+1)(S/t)·B·h·H

Balanced looping without sequence parallelism is only balanced before the heads' outputs are gathered: the output
projection runs on all tokens on every rank, and so do both projections in the backward pass:

    linear, forward 2·S·B·D·((h + 2g)·H / t + h·H)                   backward 4·S·B·D·(2h + 2g)·H

Where queries and keys are normalised over all heads (``model.qk_layernorm_over: all``), every rank projects all N of
its heads and G of its groups, and the only way is "owner":

    linear 2·S·B·D·((N + 2G)/t + h)·H                               attention as above

With the attended pairs of the data, attention is their share of that. The way of looping does not depend on the data.

Bytes: ``tensor_traffic.loop_pass_traffic``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan
from megatron_sgt.metrics.units import file_size, si
from megatron_sgt.planning.structure import most_kept_heads
from megatron_sgt.planning.tensor_traffic import LoopMethod, Transfer, loop_pass_traffic

# The ratio decides, not the values: dense bf16 arithmetic that attention reaches on an H100-class GPU, and the
# bus bandwidth of collectives inside an NVLink node (8 GPUs, 450 GB/s per direction by data sheet).
FLOPS_PER_SECOND = 400e12
BYTES_PER_SECOND = 300e9


@dataclass(frozen=True)
class LoopFlops:
    """Operations of one pass in one layer for one micro-batch on one rank, causal products counted as full ones.

    ``visible``: the share of the attention products that the causal mask leaves.
    """

    linear_forward: int
    linear_backward: int
    attention_forward: int
    visible: float

    @property
    def attention_backward(self) -> int:
        """Flash attention computes the scores again."""
        return 5 * self.attention_forward // 2

    @property
    def forward(self) -> int:
        return self.linear_forward + self.attention_forward

    @property
    def executed(self) -> int:
        return self.forward + self.linear_backward + self.attention_backward

    @property
    def needed(self) -> float:
        """Forward and backward, without the products that the causal mask hides."""
        return self.linear_forward + self.linear_backward + self.visible * 3.5 * self.attention_forward


def loop_flops(
    config: Config,
    looping: LoopMethod,
    kept_heads: tuple[int, ...],
    tp_rank: int,
    pairs: AttendedPairs | None = None,
) -> LoopFlops:
    """Operations of one pass of ``kept_heads`` on tensor-parallel rank ``tp_rank``.

    A balanced loop's ranks share the pairs of documents as they share those of whole sequences: with short documents
    the last rank has less than this.
    """
    model, parallel = config.model, config.parallel
    ranks, size, batch = parallel.tensor_model_parallel_size, model.kv_channels, config.train.micro_batch_size
    length = model.seq_length
    attended = 1 if pairs is None else pairs.share(length)
    per_row = 2 * batch * length * model.hidden_size * size  # one projected head, all tokens
    if looping == "owner":
        heads, groups = HeadLayout.of(model, ranks, tp_rank).kept_counts(kept_heads)
        projected = heads + 2 * groups
        if model.norms_all_heads:
            projected = (model.num_attention_heads + 2 * model.num_query_groups) // ranks
        linear = per_row * (projected + heads)
        attention = round(4 * batch * heads * length * length * size * attended)
        return LoopFlops(linear, 2 * linear, attention, 0.5)
    heads, groups = HeadLayout.of(model).kept_counts(kept_heads)
    share, keys = length // ranks, (tp_rank + 1) * (length // ranks)
    attention = round(4 * batch * heads * share * keys * size * attended)
    visible = 1 - share / keys / 2
    if parallel.sequence_parallel:
        linear = per_row * (2 * heads + 2 * groups) // ranks
        return LoopFlops(linear, 2 * linear, attention, visible)
    forward = per_row * (heads + 2 * groups) // ranks + per_row * heads
    return LoopFlops(forward, 2 * per_row * (2 * heads + 2 * groups), attention, visible)


@dataclass(frozen=True)
class LoopCost:
    """One pass of the loop in one layer for one micro-batch, on the busiest rank.

    ``bytes_forward``, ``bytes_backward``: payload of collectives, an all-reduce counted twice.
    """

    bytes_forward: int
    bytes_backward: int
    flops: LoopFlops

    @property
    def seconds(self) -> float:
        moved = self.bytes_forward + self.bytes_backward
        return self.flops.needed / FLOPS_PER_SECOND + moved / BYTES_PER_SECOND


def loop_cost(config: Config, method: LoopMethod, kept_heads: tuple[int, ...], precision: str = "bf16") -> LoopCost:
    """Cost of one pass of ``kept_heads`` in one layer for one micro-batch, at ``config``'s layout."""
    ranks = range(config.parallel.tensor_model_parallel_size)
    busiest = max((loop_flops(config, method, kept_heads, rank) for rank in ranks), key=lambda one: one.needed)
    forward, backward = loop_pass_traffic(config, LayerPlan(1, tuple(sorted(kept_heads))), precision, method)
    return LoopCost(_payload(forward), _payload(backward), busiest)


def _payload(transfers: tuple[Transfer, ...]) -> int:
    return sum(item.payload * (2 if item.kind == "all_reduce" else 1) for item in transfers)


def balanced_obstacle(config: Config) -> str | None:
    """Why the kept heads of this run cannot be spread over its tensor-parallel ranks; None: they can."""
    ranks = config.parallel.tensor_model_parallel_size
    if config.model.norms_all_heads:
        return "norms of queries and keys over all heads need the projections of all ranks"
    if config.model.attention_dropout > 0:
        return "attention dropout is drawn per head, by its owner"
    if uneven := [length for length in config.seq_lengths.every if length % ranks]:
        return f"seq_length {uneven[0]} does not divide over {ranks} ranks"
    return None


def loop_methods(config: Config) -> tuple[LoopMethod, ...]:
    """The ways that this run has, whatever ``parallel.loop_method`` says."""
    alone = config.parallel.tensor_model_parallel_size == 1
    return ("owner",) if alone or balanced_obstacle(config) is not None else ("owner", "balanced")


def choose_loop_method(config: Config) -> tuple[LoopMethod, str]:
    """The way of looping for this run, and why, in one line.

    A ``parallel.loop_method`` other than "auto" is taken as it is. The kept heads are not known before growth, so the
    usual case is compared: all of them on one rank.
    """
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size
    if parallel.loop_method != "auto":
        return parallel.loop_method, f"{parallel.loop_method} looping (parallel.loop_method)"
    if ranks == 1:
        return "owner", "kept heads loop where they are: there is one tensor-parallel rank"
    if (obstacle := balanced_obstacle(config)) is not None:
        return "owner", f"owner looping: {obstacle}"
    kept = tuple(range(most_kept_heads(config)))
    if not kept:
        return "owner", "no head loops"
    owner, balanced = (loop_cost(config, method, kept) for method in ("owner", "balanced"))
    better: LoopMethod = "balanced" if balanced.seconds <= owner.seconds else "owner"
    return better, (
        f"{better} looping over {ranks} tensor-parallel ranks: per pass and micro-batch "
        f"{file_size(balanced.bytes_forward)} and {si(balanced.flops.forward, ' ')}FLOP balanced, "
        f"{file_size(owner.bytes_forward)} and {si(owner.flops.forward, ' ')}FLOP at the owner (model)"
    )
