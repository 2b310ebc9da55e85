"""What the phases of a run cost: each for itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.config.lengths import LengthSpan
from megatron_sgt.config.phases import phases_of


def parts_within(config: Config, first: int, last: int) -> Iterator[LengthSpan]:
    """Steps ``first`` to ``last``, divided where the sequence length changes or a phase ends."""
    for span in config.seq_lengths.within(first, last):
        begun = span.first
        for end in (*(phase.last for phase in phases_of(config) if span.first <= phase.last < span.last), span.last):
            yield LengthSpan(begun, end, span.seq_length)
            begun = end + 1


def phase_table(config: Config, compute: Sequence[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """A row for each phase, JSON-able; none without phases.

    Args:
        compute: steps of one structure and one phase each, with their FLOPs.
        rate: FLOP/s of the whole run.
    """
    rows = []
    for phase in phases_of(config):
        inside = (entry for entry in compute if phase.first <= entry["first_step"] <= phase.last)
        flops = sum(entry["flops"] for entry in inside)
        rows.append(
            {
                "name": phase.name,
                "first_step": phase.first,
                "last_step": phase.last,
                "global_batch_size": [phase.spans[0].size, phase.spans[-1].size],
                "seq_length": phase.seq_length,
                "tokens": config.tokens_between(phase.first, phase.last),
                "flops": flops,
                "days": flops / rate / 86400,
                "settings": phase.words,
            }
        )
    return rows


def phase_lines(config: Config) -> list[str]:
    """Each phase in a line."""
    return [
        f"{phase.name}: steps {phase.first:,} to {phase.last:,} · "
        f"{config.tokens_between(phase.first, phase.last):,} tokens · {' · '.join(phase.words)}"
        for phase in phases_of(config)
    ]
