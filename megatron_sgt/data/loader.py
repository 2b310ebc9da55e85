"""From samples to micro-batches: a counter determines which rank reads which sample at which step.

Each rank of a tensor-parallel group reads the samples itself; nothing is broadcast.
"""

import signal
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_sgt.errors import DataError

MicroBatch = dict[str, torch.Tensor]


def sample_ids(consumed_samples: int, micro_batch: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Samples of one micro-batch of one rank, in a step that begins after ``consumed_samples``.

    consumed + (m · dp_size + r) · b + [0, b), with micro-batch m, data-parallel rank r and micro-batch size
    b: the union over ranks and micro-batches is the next global batch, however it is divided.
    """
    first = consumed_samples + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(first, first + micro_batch_size)


class TrainLoader(Iterator[MicroBatch]):
    """Endless micro-batches of one data-parallel rank: dicts of tensors [micro_batch_size, T] (``num_tokens``: [B]).

    Starts at any ``consumed_samples``, even one reached with another batch size or number of ranks. With
    ``num_workers`` > 0 that many processes read ahead; the micro-batches are the same.
    """

    def __init__(
        self,
        dataset: Dataset[MicroBatch],
        micro_batch_size: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= dp_rank < dp_size or min(micro_batch_size, num_micro_batches) < 1 or consumed_samples < 0:
            raise ValueError(
                f"micro_batch_size {micro_batch_size}, num_micro_batches {num_micro_batches}, "
                f"consumed_samples {consumed_samples}, rank {dp_rank} of {dp_size}: out of range"
            )
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self._start = consumed_samples
        self._dp_size = dp_size
        self._num_handed_out = 0
        # Nothing below refers back to this object: in a cycle, the garbage collector would end the worker processes;
        # it destroys their queues first and then waits 5 s for each of them.
        ids = _ids_of_rank(consumed_samples, micro_batch_size, num_micro_batches, dp_rank, dp_size)
        self._batches = _read(dataset, ids, num_workers, pin_memory)

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self._dp_size

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks in the steps whose micro-batches have all been returned."""
        return self._start + self._num_handed_out // self.num_micro_batches * self.global_batch_size

    def __next__(self) -> MicroBatch:
        failure = None
        try:
            batch = next(self._batches)
        except DataError as error:
            # The message of a worker process is its whole traceback, of which the user needs the last line.
            last_line = str(error).strip().splitlines()[-1]
            failure = last_line.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
            error.__traceback__ = None  # in a cycle with the exception, it would keep the workers alive
        if failure is not None:
            raise DataError(failure)
        self._num_handed_out += 1
        return batch


class EvalLoader:
    """The micro-batches of one evaluation: every pass reads samples 0 .. num_steps · global batch - 1 again.

    With ``num_samples`` no sample from that number on counts: its ``loss_mask`` is 0.
    """

    def __init__(
        self,
        dataset: Dataset[MicroBatch],
        micro_batch_size: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        num_steps: int,
        pin_memory: bool = False,
        num_samples: int | None = None,
    ) -> None:
        read = dataset if num_samples is None else _Bounded(dataset, num_samples)
        self._arguments = (read, micro_batch_size, num_micro_batches, dp_rank, dp_size)
        self._num_batches = num_steps * num_micro_batches
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        return islice(TrainLoader(*self._arguments, pin_memory=self._pin_memory), self._num_batches)


class _Bounded(Dataset[MicroBatch]):
    """The first ``size`` samples; for what lies behind them, the first one without a position that counts."""

    def __init__(self, dataset: Dataset[MicroBatch], size: int) -> None:
        self._dataset = dataset
        self._size = size

    def __getitem__(self, index: int) -> MicroBatch:
        if index < self._size:
            return self._dataset[index]
        sample = self._dataset[0]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}


def _ids_of_rank(
    consumed_samples: int, micro_batch_size: int, num_micro_batches: int, dp_rank: int, dp_size: int
) -> Iterator[list[int]]:
    for step in count():
        consumed = consumed_samples + step * num_micro_batches * dp_size * micro_batch_size
        for m in range(num_micro_batches):
            yield list(sample_ids(consumed, m, micro_batch_size, dp_rank, dp_size))


def _read(
    dataset: Dataset[MicroBatch], ids: Iterator[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    if num_workers == 0 and not pin_memory:
        return (_stack([dataset[i] for i in batch]) for batch in ids)
    # Forked workers inherit the mapped indices; spawned ones would receive a copy of them through a pipe.
    context = "fork" if num_workers and "fork" in torch.multiprocessing.get_all_start_methods() else None
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=ids,
        num_workers=num_workers,
        collate_fn=_stack,
        worker_init_fn=_leave_signals_to_the_run if num_workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        # Without its own generator it would draw from, and so shift, the random stream of training.
        generator=torch.Generator(),
    )
    return _lazily(loader)


def _stack(samples: list[MicroBatch]) -> MicroBatch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and schedulers signal every process of a run, but the step being finished still needs its data.

    The loader ends its workers by a message, and a worker without a parent ends by itself.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def _lazily(loader: DataLoader[Any]) -> Iterator[MicroBatch]:
    yield from loader
