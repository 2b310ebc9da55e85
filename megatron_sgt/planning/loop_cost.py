"""What a sparse loop pass costs a tensor-parallel rank, and which way of looping is cheaper. Pure.

Two ways (see head_loop.py and balanced_loop.py): "owner", each rank loops the kept heads that it owns, and
"balanced", each rank loops all kept heads for its share of the tokens. h kept heads on g key/value groups of
size H, S·B tokens of width D, t ranks; bytes are those a collective hands to a rank (payload), per pass:

    forward   owner     2 · S·B·D            all-gather + reduce-scatter, or one all-reduce (counted twice)
              balanced  2 · S·B·g·H          keys and values; without sequence parallelism + S·B·h·H, outputs
    backward  owner     2 · S·B·D
              balanced  2 · S·B·g·H          their gradients; without SP + S·B·(h + 2g)·H, projections'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sgt.config import Config
from megatron_sgt.parallel.head_layout import HeadLayout

LoopMethod = Literal["owner", "balanced"]

# The ratio decides, not the values: dense bf16 arithmetic that attention reaches on an H100-class GPU, and the
# bus bandwidth of collectives inside an NVLink node (8 GPUs, 450 GB/s per direction by data sheet).
FLOPS_PER_SECOND = 400e12
BYTES_PER_SECOND = 300e9


@dataclass(frozen=True)
class LoopCost:
    """One forward pass of the loop in one layer, on the rank that works most.

    ``bytes_forward``, ``bytes_backward``: payload of collectives; ``flops``: forward operations.
    """

    bytes_forward: int
    bytes_backward: int
    flops: int

    @property
    def seconds(self) -> float:
        """Modelled time of forward and backward (twice the forward's arithmetic and more for attention)."""
        return (
            3 * self.flops / FLOPS_PER_SECOND + (self.bytes_forward + self.bytes_backward) / BYTES_PER_SECOND
        )


def loop_cost(
    config: Config, method: LoopMethod, kept_heads: tuple[int, ...], element_bytes: int = 2
) -> LoopCost:
    """Cost of one pass of ``kept_heads`` in one layer for one micro-batch, at ``config``'s layout."""
    model, parallel = config.model, config.parallel
    ranks, size = parallel.tensor_model_parallel_size, model.kv_channels
    tokens = config.train.micro_batch_size * model.seq_length
    layout = HeadLayout(model.num_attention_heads, model.num_query_groups, size)
    kept = layout.local(kept_heads)
    heads, groups = len(kept.heads), len(kept.groups)
    if method == "owner":
        busiest = max(
            (
                HeadLayout(model.num_attention_heads, model.num_query_groups, size, ranks, rank).local(
                    kept_heads
                )
                for rank in range(ranks)
            ),
            key=lambda part: len(part.heads),
        )
        heads_here, groups_here, share, causal = len(busiest.heads), len(busiest.groups), 1.0, 0.5
        moved = 2 * tokens * model.hidden_size if ranks > 1 else 0
        forward = backward = moved
    else:
        # The last rank sees all keys: its part of the causal triangle is (2t - 1) / t² of the whole.
        heads_here, groups_here = heads, groups
        share, causal = 1.0 / ranks, 0.5 * (2 * ranks - 1) / ranks**2
        forward = backward = 2 * tokens * groups * size
        if not parallel.sequence_parallel:
            forward += tokens * heads * size
            backward += tokens * (heads + 2 * groups) * size
    projections = 2 * tokens * model.hidden_size * (2 * heads_here + 2 * groups_here) * size
    attention = 4 * tokens * model.seq_length * heads_here * size
    flops = round(share * projections + causal * attention)
    return LoopCost(forward * element_bytes, backward * element_bytes, flops)


def choose_loop_method(config: Config) -> tuple[LoopMethod, str]:
    """The way of looping for this run, and why, in one line.

    ``parallel.loop_method`` other than "auto" is obeyed. The kept heads are not known before growth, so the
    usual case is compared: all of them on one rank.
    """
    parallel, model, growth = config.parallel, config.model, config.growth
    ranks = parallel.tensor_model_parallel_size
    if parallel.loop_method != "auto":
        return parallel.loop_method, f"{parallel.loop_method} looping (parallel.loop_method)"
    if ranks == 1:
        return "owner", "kept heads loop where they are: there is one tensor-parallel rank"
    if model.attention_dropout > 0:
        return "owner", "owner looping: attention dropout is drawn per head, by its owner"
    if model.seq_length % ranks:
        return "owner", f"owner looping: seq_length {model.seq_length} does not divide over {ranks} ranks"
    count = model.num_attention_heads if growth.head_choice == "all" else growth.num_keep_heads
    kept = tuple(range(min(count, model.num_attention_heads)))
    owner, balanced = (loop_cost(config, method, kept) for method in ("owner", "balanced"))
    better: LoopMethod = "balanced" if balanced.seconds <= owner.seconds else "owner"
    return better, (
        f"{better} looping over {ranks} tensor-parallel ranks: per pass and micro-batch "
        f"{balanced.bytes_forward / 1e6:.2f} MB and {balanced.flops / 1e9:.2f} GFLOP balanced, "
        f"{owner.bytes_forward / 1e6:.2f} MB and {owner.flops / 1e9:.2f} GFLOP at the owner (model)"
    )
