"""Bytes and calls of the tensor-parallel collectives of one micro-batch, in closed form.

The payload of a collective is the whole tensor: what an all-gather returns, what a reduce-scatter is given, what an
all-reduce works on. A ring moves (n-1)/n of it per rank, an all-reduce twice that (``Transfer.wire_bytes``).

With T = S·B·D elements, tp tensor-parallel ranks, h kept heads on g groups of size H, per micro-batch
(arXiv 2205.05198, and what Megatron-Core 0.16 does):

    attention or MLP   forward  all-reduce T                 SP: all-gather T, reduce-scatter T
                       backward all-reduce T                 SP: all-gather 2T (input again, output gradient),
                                                                 reduce-scatter T
    loop, window       as the attention
    loop, owner        as the attention, but the gathered input is kept: one all-gather less in the backward pass
    loop, balanced     forward  all-gather S·B·2g·H          without SP also all-gather S·B·h·H (outputs)
                       backward reduce-scatter S·B·2g·H      without SP also all-gather S·B·(h+2g)·H
    kept weights       per step, not per pass: all-reduce ((h+2g)·H + h·H)·D; SP: and once in fp32 backward
    embedding          forward  all-reduce T                 SP: reduce-scatter T; backward all-gather T
    output projection  backward all-reduce T                 SP: forward all-gather T; backward all-gather T,
                                                                 reduce-scatter T
    loss               three all-reduces of S·B fp32
    replicated weights under SP one all-reduce of each norm's and output bias' gradient per use; of q/k norms always
    q/k norms over all heads: two all-reduces of S·B fp32 forward, two backward, per pass; their weights are split, and
    a loop, owner, is as the attention

Full recompute sends a layer's forward collectives again, except the last one, whose result nobody needs (with dropout
or a norm after it, all).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.arch.weight import ELEMENT_BYTES
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "send"]
Group = Literal["tensor", "data", "pipeline", "tied", "world"]
LoopMethod = Literal["owner", "balanced"]


@dataclass(frozen=True)
class Transfer:
    """Collectives, or messages, of one kind for one purpose; ``payload`` is the bytes of all ``calls`` together."""

    part: str
    group: Group
    kind: Kind
    payload: int
    calls: int = 1

    def wire_bytes(self, ranks: int) -> float:
        """Bytes that each of ``ranks`` ranks sends (and receives) in a ring; of messages what this rank sends."""
        if self.kind in ("send", "broadcast"):
            return self.payload
        return self.payload * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)

    def times(self, factor: int) -> Transfer:
        return replace(self, payload=self.payload * factor, calls=self.calls * factor)


def merged(transfers: Iterable[Transfer]) -> tuple[Transfer, ...]:
    """One entry for each (part, group, kind), in the order of first appearance; what sends nothing is left out."""
    totals: dict[tuple[str, Group, Kind], Transfer] = {}
    for item in transfers:
        key = (item.part, item.group, item.kind)
        old = totals.get(key)
        totals[key] = (
            item if old is None else replace(old, payload=old.payload + item.payload, calls=old.calls + item.calls)
        )
    return tuple(item for item in totals.values() if item.calls)


def loop_pass_traffic(
    config: Config, plan: LayerPlan, precision: str, method: LoopMethod
) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """(forward, backward) collectives of one loop pass of one layer for one micro-batch."""
    step = MicroBatch(config, ELEMENT_BYTES[precision], method)
    return (*map(merged, step.loop_pass(plan)),) if step.ranks > 1 else ((), ())  # type: ignore[return-value]


class MicroBatch:
    """The tensor-parallel collectives of one micro-batch, as (forward, backward) lists or their sum."""

    def __init__(self, config: Config, element_bytes: int, method: LoopMethod) -> None:
        model, train = config.model, config.train
        self.config, self.bytes, self.looping = config, element_bytes, method
        self.ranks = config.parallel.tensor_model_parallel_size
        self.sharded = config.parallel.sequence_parallel
        self.tokens = train.micro_batch_size * model.seq_length
        self.stream = self.tokens * model.hidden_size * element_bytes
        self.norm_vectors = 2 if model.normalization == "LayerNorm" else 1
        self.recomputed = frozenset(config.recomputed_layers("full"))

    def ends(self, first: bool, last: bool) -> Iterator[Transfer]:
        """Of the embedding (on the ``first`` pipeline stage), and of output layer and loss (on the ``last``)."""
        if first and self.sharded:
            yield Transfer("embedding", "tensor", "reduce_scatter", self.stream)
            yield Transfer("embedding", "tensor", "all_gather", self.stream)
        elif first:
            yield Transfer("embedding", "tensor", "all_reduce", self.stream)
        if not last:
            return
        if self.sharded:
            yield from self._norm_gradients("output")
            yield Transfer("output", "tensor", "all_gather", 2 * self.stream, 2)
            yield Transfer("output", "tensor", "reduce_scatter", self.stream)
        else:
            yield Transfer("output", "tensor", "all_reduce", self.stream)
        yield Transfer("loss", "tensor", "all_reduce", 3 * 4 * self.tokens, 3)

    def layer(self, plan: LayerPlan, recomputed: bool) -> Iterator[Transfer]:
        part = "ordinary layers"
        attention, mlp = self._attention(part), self._mlp(part)
        loop_forward, loop_backward = self.loop_pass(plan)
        for execution in range(plan.executions):
            name = "block loops" if execution else part
            passes = [*attention[0], *mlp[0], *attention[1], *mlp[1]]
            if recomputed:
                # The last collective's result is needed by nobody, unless a dropout mask or a norm comes after it.
                model = self.config.model
                needed = model.hidden_dropout or model.norm_position == "output"
                passes += [*attention[0], *mlp[0]] if needed else [*attention[0], *mlp[0][:-1]]
            yield from (replace(item, part=name) for item in passes)
            for _ in range(plan.loops):
                yield from loop_forward
                yield from loop_backward
                if recomputed:
                    yield from loop_forward

    def loop_pass(self, plan: LayerPlan) -> tuple[list[Transfer], list[Transfer]]:
        if plan.loops == 0:
            return [], []
        if plan.phase == "window":
            return self._attention("loops in the window")
        if self.looping == "owner":
            forward, backward = self._attention("loops")
            if self.sharded and not self.config.model.norms_all_heads:  # the gathered input is kept for the backward
                backward = [item for item in backward if item.kind != "all_gather"]
                backward.append(Transfer("loops", "tensor", "all_gather", self.stream))
            return forward, backward
        return self._balanced(plan)

    def kept_weights(self, plan: LayerPlan) -> Iterator[Transfer]:
        """Once per optimizer step for each layer that loops in the balanced way."""
        if plan.phase != "sparse" or self.looping != "balanced":
            return
        model = self.config.model
        heads, groups = HeadLayout.of(model).kept_counts(plan.kept_heads)
        rows, columns = (heads + 2 * groups) * model.kv_channels, heads * model.kv_channels
        slices = [rows * model.hidden_size, columns * model.hidden_size]
        if model.add_bias_linear or model.add_qkv_bias:
            slices.append(rows)
        for elements in slices:
            yield Transfer("kept weights", "tensor", "all_reduce", elements * self.bytes)
            if self.sharded:
                yield Transfer("kept weights", "tensor", "all_reduce", elements * 4)

    def _attention(self, part: str) -> tuple[list[Transfer], list[Transfer]]:
        forward, backward = self._pair(part)
        if self.config.model.norms_all_heads:
            squares = Transfer(part, "tensor", "all_reduce", 2 * 4 * self.tokens, 2)
            return [*forward[:-1], squares, forward[-1]], [*backward, squares]
        return forward, [*backward, *self._head_norm_gradients(part)]

    def _mlp(self, part: str) -> tuple[list[Transfer], list[Transfer]]:
        return self._pair(part)

    def _pair(self, part: str) -> tuple[list[Transfer], list[Transfer]]:
        if not self.sharded:
            one = [Transfer(part, "tensor", "all_reduce", self.stream)]
            return one, list(one)
        gather = Transfer(part, "tensor", "all_gather", self.stream)
        scatter = Transfer(part, "tensor", "reduce_scatter", self.stream)
        backward = [gather, gather, scatter, *self._norm_gradients(part)]
        return [gather, scatter], [*backward, *self._output_bias_gradient(part)]

    def _balanced(self, plan: LayerPlan) -> tuple[list[Transfer], list[Transfer]]:
        model = self.config.model
        heads, groups = HeadLayout.of(model).kept_counts(plan.kept_heads)
        head = self.tokens * model.kv_channels * self.bytes
        forward = [Transfer("loops", "tensor", "all_gather", 2 * groups * head)]
        backward = [Transfer("loops", "tensor", "reduce_scatter", 2 * groups * head)]
        backward += self._head_norm_gradients("loops")
        if self.sharded:
            backward += [*self._norm_gradients("loops"), *self._output_bias_gradient("loops")]
        else:
            forward.append(Transfer("loops", "tensor", "all_gather", heads * head))
            backward.append(Transfer("loops", "tensor", "all_gather", (heads + 2 * groups) * head))
        return forward, backward

    def _norm_gradients(self, part: str) -> list[Transfer]:
        """Of one norm, whose weights are replicated while its tokens are shared out."""
        count, size = self.norm_vectors, self.config.model.hidden_size
        return [Transfer(part, "tensor", "all_reduce", count * size * self.bytes, count)]

    def _head_norm_gradients(self, part: str) -> list[Transfer]:
        if not self.config.model.qk_layernorm:
            return []
        return [Transfer(part, "tensor", "all_reduce", 2 * self.config.model.kv_channels * self.bytes, 2)]

    def _output_bias_gradient(self, part: str) -> list[Transfer]:
        if not self.config.model.add_bias_linear:
            return []
        return [Transfer(part, "tensor", "all_reduce", self.config.model.hidden_size * self.bytes)]
