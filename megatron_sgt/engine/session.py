"""What of a run lasts as long as its process, while stages with models of different sizes come and go."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.data.gpt_dataset import build_datasets, follow, open_validation_sets
from megatron_sgt.data.ledger import Ledger
from megatron_sgt.data.loader import TrainLoader
from megatron_sgt.data.measured_pairs import measured_pairs
from megatron_sgt.data.tokenizer import Tokenizer, tokenizer_of
from megatron_sgt.engine.build import start_processes
from megatron_sgt.engine.data_start import DataStart, data_start
from megatron_sgt.engine.hooks.base import Hook, own_hooks
from megatron_sgt.engine.live_tasks import RunTasks, open_tasks, run_no_tasks
from megatron_sgt.engine.run_folders import RunFolders
from megatron_sgt.engine.skipped_ranges import SkippedRanges
from megatron_sgt.engine.step import TrainState
from megatron_sgt.errors import ConfigError
from megatron_sgt.guard import Progress, Watch
from megatron_sgt.guard.save_now import SaveTrigger
from megatron_sgt.guard.stop import StopRequests
from megatron_sgt.launch.environment import RankInfo
from megatron_sgt.metrics import MetricsHub, build_hub
from megatron_sgt.optim.schedule import check_curve
from megatron_sgt.parallel.collectives import on_rank_zero
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.preflight import Start, check_surroundings, tokenizer_fingerprint, with_vocabulary
from megatron_sgt.stages.stages import stages_of


class Session:
    """Process groups, folders, data, reports and counters of one run. Collective over all ranks.

    Attributes:
        config: of the whole run; that of a stage has no ``growth.stages``.
        stages: of the run, all validated.
        train_data, valid_data: the data sets, None before ``open_data`` or where there is no such split.
        valid_sets: those of data.valid, by name. tokenizer: of the data, None without one.
        run_tasks: of evaluation.tasks, for rank 0.
        pairs: of query and key that attend, measured from the data by ``open_data``; None: those of whole sequences.
        about: what the manifests of checkpoints say of the run.
        data: the blends of the run and where it began in them, None before ``start_data``.
        ledger: what the run has read of its data so far, and how it goes on.

    Raises:
        ConfigError, DataError: what the user can correct, most of it before any process group.
    """

    def __init__(
        self,
        config: Config,
        info: RankInfo,
        stop: StopRequests | None = None,
        watch: Watch | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.stop = StopRequests(config.train) if stop is None else stop
        self.progress = Progress() if watch is None else watch.progress
        config.num_micro_batches(info.world_size)  # refuse the batch arithmetic before any process group
        check_surroundings(config)
        self.own_hooks = own_hooks(config, hooks)
        self.config = with_vocabulary(config)
        self.stages = stages_of(self.config)
        check_curve(self.stages)
        self.groups: ParallelGroups = start_processes(self.config, info)
        if watch is not None:
            watch.connect()
        self.folders = RunFolders(self.config)
        self.state = TrainState()
        self.hub = MetricsHub()
        self.skipped_ranges = SkippedRanges(self.config.save_dir)
        self.train_data: Any = None
        self.valid_data: Any = None
        self.valid_sets: dict[str, Any] = {}
        self.tokenizer: Tokenizer | None = None
        self.run_tasks: RunTasks = run_no_tasks
        self.pairs: AttendedPairs | None = None
        self.about: dict[str, Any] = {}
        self.data: DataStart | None = None
        self.ledger = Ledger(())
        self._own_at_first: dict[str, dict[str, Any]] | None = None
        self.folders.take()
        if self.groups.is_main:
            self.stop.trigger = SaveTrigger(Path(self.config.logging.run_dir))

    def open_data(self) -> None:
        """Open the data sets; collective. The tokenizer is read here, once: its file may be gone in days."""
        self.about = {"tokenizer": on_rank_zero(lambda: tokenizer_fingerprint(self.config))}
        self.tokenizer = tokenizer_of(self.config.data)
        self.train_data, self.valid_data, *_ = build_datasets(self.config, self.tokenizer)
        self.valid_sets = open_validation_sets(self.config, self.tokenizer)
        if self.config.evaluation.tasks:
            opened: list[RunTasks] = []
            on_rank_zero(lambda: opened.append(open_tasks(self.config, self.tokenizer)))
            self.run_tasks = opened[0] if opened else run_no_tasks
        if self.config.data.reset_attention_mask:
            self.pairs = on_rank_zero(lambda: measured_pairs(self.config))

    def start_data(self, start: Start) -> DataStart:
        """Let the training data go on where the checkpoint of ``start`` has left it; collective."""
        self.data = on_rank_zero(lambda: data_start(self.config, start))
        self.follow(self.data.ledger)
        return self.data

    def turn_blend(self, data_path: Sequence[str]) -> None:
        """Read another blend from ``state.consumed_samples`` on, in which each source goes on where it was; collective.

        Checkpoints from now on say so; one from before goes on with the blend that it was saved in. Nothing changes
        where the blend is the present one. A loader that is open has read ahead: open another one (``open_loader``).

        Args:
            data_path: one of ``config.data_paths``, whose data sets ``open_data`` has opened and checked.
        """
        assert self.data is not None, "start_data comes before"
        order = self.data.orders[tuple(data_path)]
        self.follow(self.ledger.turned(order, self.state.consumed_samples, self.data.begins))

    def follow(self, ledger: Ledger) -> None:
        """Take ``ledger`` for what the run has read; collective."""
        self.ledger = ledger
        follow(self.train_data, ledger.now, self.config)

    def own_at_first(self) -> dict[str, dict[str, Any]]:
        """By name, the states of the user's hooks when they were first attached, and no checkpoint was loaded."""
        if self._own_at_first is None:
            self._own_at_first = {hook.name: copy.deepcopy(hook.state_dict()) for hook in self.own_hooks}
        return self._own_at_first

    def open_loader(self, consumed_samples: int) -> TrainLoader:
        """This rank's micro-batches of training from a place in the data order on, in steps of the next one's size."""
        size = self.config.batches.at(self.state.step + 1)
        return TrainLoader(
            self.train_data,
            self.config.train.micro_batch_size,
            self.config.num_micro_batches(self.groups.world_size, size),
            self.groups.dp_rank,
            self.groups.dp_size,
            consumed_samples,
            self.config.data.num_workers,
            pin_memory=self.groups.device.type != "cpu",
        )

    def open_hub(self) -> None:
        """Rank 0's hub has the writers. What cannot be written at the start is refused, on all ranks."""
        opened: list[MetricsHub] = []
        on_rank_zero(lambda: opened.append(self._hub_of_rank_zero()))
        self.hub = opened[0] if opened else MetricsHub()

    def _hub_of_rank_zero(self) -> MetricsHub:
        shown = self.config.model_dump()
        try:
            self.folders.write_config()
            return build_hub(self.config.logging, self.config.train.train_iters, shown, self.folders.check)
        except OSError as error:
            raise ConfigError(
                f"logging.run_dir: cannot write to {self.config.logging.run_dir}: {error.strerror}; make room, or "
                "choose another folder"
            ) from error

    def write_skipped_ranges(self) -> None:
        """For rank 0."""
        self.folders.check()
        self.skipped_ranges.write()
