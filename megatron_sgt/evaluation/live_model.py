"""The model of a running training as what answers a harness: rank 0 asks, all ranks compute.

The harness runs on rank 0 alone. What it asks for reaches the others as a list of token sequences, once for each kind
of request; the data-parallel ranks share the sequences, and the ranks of one model compute each together. The ranks
wait for rank 0 at the key-value store, in no collective, so that reading a task's data may take long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sgt.errors import DataError, SGTError, first_line
from megatron_sgt.evaluation.token_scores import token_scores
from megatron_sgt.parallel.collectives import any_rank, on_rank_zero
from megatron_sgt.parallel.groups import ParallelGroups

T = TypeVar("T")
Sequences = Sequence[tuple[list[int], int]]

_MULTIPLE = 16
"""Lengths are padded to multiples of it, for kernels and so that few different shapes occur."""


@dataclass(frozen=True)
class _Score:
    sequences: Sequences


@dataclass(frozen=True)
class _Continue:
    contexts: list[list[int]]
    new_tokens: int
    until: tuple[str, ...]


def _not_here() -> Any:
    """What rank 0 alone does."""


class LiveModel:
    """Built on every rank, for one engine.

    Args:
        batch_size: sequences of one forward pass on a data-parallel rank.
        max_length: tokens that the model sees at once.
        decode: ids -> text, where a continuation is to end; ``end``: the id that ends a text.
        alive: called before every forward pass: a long evaluation is no hang.
    """

    def __init__(
        self,
        engine: Any,
        groups: ParallelGroups,
        batch_size: int,
        vocab_size: int,
        max_length: int,
        decode: Callable[[list[int]], str],
        end: int,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.max_length = max_length
        self._engine = engine
        self._groups = groups
        self._batch_size = batch_size
        self._vocab_size = vocab_size
        self._decode = decode
        self._end = end
        self._alive = alive
        self._broken: Exception | None = None
        """What ended a computation of all ranks on this one."""

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on every rank: rank 0 does it, the others compute what it asks for. Collective.

        Raises:
            SGTError: on every rank, when ``work`` raised it; a DataError, when it raised anything else.
            Exception: on this rank alone, what a forward pass raised: the others are inside it and wait.
        """
        if not self._groups.is_main:
            while isinstance(told := on_rank_zero(_not_here), _Score | _Continue):
                self._run(told)
            return told
        failure: SGTError | None = None
        try:
            found = work()
        except Exception as error:
            if self._broken is not None:  # whatever ``work`` has made of it
                raise self._broken from None
            failure = (
                error if isinstance(error, SGTError) else DataError(f"{type(error).__name__}: {first_line(error)}")
            )

        def tell() -> T:
            if failure is not None:
                raise failure
            return found

        return on_rank_zero(tell)

    def score(self, sequences: Sequences) -> list[tuple[float, bool]]:
        """For rank 0 inside ``together``.

        Args:
            sequences: (tokens, n): its last n tokens are judged. At most ``max_length`` + 1 tokens each.

        Returns:
            ln of the probability of these n after the tokens before them, and whether they are the likeliest ones.
        """
        return self._ask(_Score(sequences))

    def continuations(self, contexts: list[list[int]], new_tokens: int, until: Sequence[str]) -> list[list[int]]:
        """For rank 0 inside ``together``: the likeliest tokens after each of ``contexts``, one by one.

        At most ``new_tokens`` of them, and none after the end of the text or one of the texts ``until``. Nothing is
        kept between two tokens: each takes a forward pass over all before it.
        """
        return self._ask(_Continue(contexts, new_tokens, tuple(text for text in until if text)))

    def _ask(self, job: _Score | _Continue) -> list[Any]:
        try:
            return self._run(on_rank_zero(lambda: job))
        except Exception as error:
            self._broken = error
            raise

    def _run(self, job: _Score | _Continue) -> list[Any]:
        """Every rank its share; rank 0 needs the result."""
        lengths = [len(one[0]) for one in job.sequences] if isinstance(job, _Score) else list(map(len, job.contexts))
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        blocks = [order[n : n + self._batch_size] for n in range(0, len(order), self._batch_size)]
        ranks, rank = self._groups.dp_size, self._groups.dp_rank
        found: dict[int, Any] = {}
        for turn in range(0, len(blocks), ranks):
            # ZeRO-3 fetches weights in passes of all ranks: one that has nothing left repeats the first block.
            block = blocks[turn + rank] if turn + rank < len(blocks) else blocks[0]
            if isinstance(job, _Score):
                found |= zip(block, self._score([job.sequences[index] for index in block]), strict=True)
            else:
                found |= zip(block, self._continue([job.contexts[index] for index in block], job), strict=True)
        shares: list[Any] = [found]
        if ranks > 1:
            shares = [None] * ranks
            dist.all_gather_object(shares, found, group=self._groups.dp_group)
        merged = {index: value for share in shares for index, value in share.items()}
        return [merged[index] for index in range(len(lengths))]

    def _score(self, sequences: Sequences) -> list[tuple[float, bool]]:
        chances, best, targets = self._forward([tokens for tokens, _ in sequences])
        scored = []
        for row, (tokens, count) in enumerate(sequences):
            judged = slice(len(tokens) - 1 - count, len(tokens) - 1)
            same = torch.equal(best[row, judged], targets[row, judged])
            scored.append((float(chances[row, judged].double().sum()), same))
        return scored

    def _continue(self, contexts: list[list[int]], job: _Continue) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in contexts]
        done = [False] * len(contexts)
        for _ in range(job.new_tokens):
            if not any_rank(not all(done), self._groups):
                break
            # A last token without meaning: what follows it is not asked for.
            rows = [[*context, *more, 0] for context, more in zip(contexts, new, strict=True)]
            _, best, _ = self._forward(rows)
            for row, tokens in enumerate(rows):
                if not done[row]:
                    token = int(best[row, len(tokens) - 2])
                    new[row].append(token)
                    text = self._decode(new[row]) if job.until else ""
                    done[row] = token == self._end or any(stop in text for stop in job.until)
        return new

    def _forward(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores and likeliest ids after every token of ``rows`` but the last, on the host, and the true next ids."""
        self._alive()
        multiple = _MULTIPLE * self._groups.tp_size
        longest = max(map(len, rows)) - 1
        length = max(longest, min(-(-longest // multiple) * multiple, self.max_length))
        padded = torch.zeros(len(rows), length + 1, dtype=torch.int64)  # behind a text, where no token of it looks
        for row, tokens in zip(padded, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        inputs, targets = padded[:, :-1].contiguous(), padded[:, 1:]
        chances, best = token_scores(self._engine, inputs, targets, self._vocab_size, self._groups)
        return chances.cpu(), best.cpu(), targets
