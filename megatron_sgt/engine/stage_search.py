"""Trains the supernet of a search for the next depth, and measures its sub-nets; what it has trained is thrown away.

stages/search.py says what is searched, and who wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from megatron_sgt.checkpoint import manifest
from megatron_sgt.checkpoint.layout import GROWTH_STATE, STAGES_STATE
from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, WEIGHTS
from megatron_sgt.checkpoint.surgery.reader import GrownReader, Opened, open_any
from megatron_sgt.checkpoint.surgery.state import grown_hooks
from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.data.gpt_dataset import build_datasets, follow
from megatron_sgt.data.loader import EvalLoader, TrainLoader
from megatron_sgt.data.tokenizer import tokenizer_of
from megatron_sgt.engine.build import build_runtime
from megatron_sgt.engine.data_start import data_start
from megatron_sgt.engine.loop import DivergedError
from megatron_sgt.engine.skipped_ranges import SkippedRanges, batches_outside
from megatron_sgt.engine.step import Batch, train_step
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.evaluation.perplexity import mean_loss
from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.optim.schedule import rate_after
from megatron_sgt.parallel.collectives import gather_or_raise, on_rank_zero
from megatron_sgt.parallel.device import synchronize
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.preflight import Start
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.growth import Growth
from megatron_sgt.stages.learning_rate import RatePolicy
from megatron_sgt.stages.operators import auto_prog
from megatron_sgt.stages.optimizer import Carried
from megatron_sgt.stages.search import executed_layers, measured_after, sampled

ROUNDS = 7
"""Steps of each candidate that are timed, in turns."""


@dataclass(frozen=True)
class Measured:
    """By depth: mean loss of the measurements in nats per token, and median seconds of a step."""

    losses: dict[int, float]
    seconds: dict[int, float]


def supernet_config(config: Config, growth: Growth, step: int) -> Config:
    """The configuration that trains the supernet ``growth`` of a checkpoint after ``step`` steps.

    It has ZeRO, so that a layer without a gradient is treated alike under every layout: as if it were zero.

    Raises:
        ConfigError: the supernet does not fit the run.
    """
    values = grown_config(config, growth, step).model_dump()
    stage = max(1, config.parallel.zero_stage)
    values["parallel"]["zero_stage"] = stage
    values["deepspeed"]["zero_optimization"] = {**values["deepspeed"].get("zero_optimization", {}), "stage": stage}
    return parse_config(values, source="the supernet")


class StageSearch:
    """The supernet of one search, trained and measured. Collective over all ranks.

    Args:
        folder: the checkpoint; nothing in it changes.
        config: of the checkpoint's model, with the layout and the data of the search.
        growth: from that model to the supernet.
        depths: the candidates, ascending.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: see ``check_cut``.
        DataError: there is no validation data.
    """

    def __init__(
        self, folder: Path, config: Config, growth: Growth, depths: Sequence[int], groups: ParallelGroups
    ) -> None:
        on_rank_zero(partial(manifest.verify_checksums, folder))
        opened: list[Opened] = []
        gather_or_raise(lambda: opened.append(open_any(folder)), groups)
        self.step: int = opened[0].saved["trainer"]["step"]
        self.policies = recorded_policies(opened[0].saved)
        self.averaged = AVERAGE in opened[0].tensors.quantities
        self.depths = tuple(depths)
        self.config, self.groups = supernet_config(config, growth, self.step), groups
        whole = inherited_plan(opened[0], config, self.config, growth)
        check_cut(pipeline_layout(self.config), growth, self.depths)
        layers = set(range(growth.new.num_layers))
        self._plans = {d: whole.skipping(layers - set(executed_layers(growth, d))) for d in self.depths}
        self._open_data(folder, opened[0].saved)
        self._runtime = build_runtime(self.config, groups)
        self._load(opened[0], growth)

    def _open_data(self, folder: Path, saved: dict[str, Any]) -> None:
        """Training goes on where the run stands, past what it skips; validation reads what the run's reads."""
        config, groups = self.config, self.groups
        train, valid, _ = build_datasets(config, tokenizer_of(config.data))
        if valid is None:
            raise DataError(
                f"data.split: {config.data.split} leaves no validation samples, by which the candidates are compared"
            )
        shape = (config.train.micro_batch_size, config.num_micro_batches(groups.world_size))
        place = (groups.dp_rank, groups.dp_size)
        self._valid = EvalLoader(valid, *shape, *place, config.train.eval_iters)
        follow(train, on_rank_zero(lambda: data_start(config, Start(folder, saved))).ledger.now, config)
        skipped = on_rank_zero(lambda: SkippedRanges.read(folder.parent))
        self._batches: Iterator[Batch] = batches_outside(
            lambda consumed: TrainLoader(train, *shape, *place, consumed, config.data.num_workers),
            skipped,
            saved["trainer"]["consumed_samples"],
        )

    def _load(self, opened: Opened, growth: Growth) -> None:
        made_of = AVERAGE if self.averaged else WEIGHTS
        reader = GrownReader(opened.tensors, growth, Carried(0, "fresh"), self.config.train.seed, 1, made_of)
        load_into_engine(reader, 0, opened.loss_scale, self.config, self._runtime.engine, self.groups)

    def run(self, steps: int, tell: Callable[[int, dict[int, float]], None]) -> Measured:
        """Train the supernet for ``steps`` steps, one random sub-net in each, then time all of them.

        Args:
            tell: gets each measurement, as the step and the losses by depth.

        Raises:
            DivergedError: a loss is not finite.
        """
        self._runtime.engine.train()
        found: list[dict[int, float]] = []
        for step, depth in enumerate(sampled(self.depths, steps, self.config.train.seed), 1):
            self._train(depth, step)
            if step in measured_after(steps):
                found.append(self._losses(step))
                tell(step, found[-1])
        seconds: dict[int, list[float]] = {depth: [] for depth in self.depths}
        for _ in range(ROUNDS):
            for depth in self.depths:
                seconds[depth].append(self._train(depth, steps))
        losses = {depth: mean(losses[depth] for losses in found) for depth in self.depths}
        return Measured(losses, {depth: median(times) for depth, times in seconds.items()})

    def _train(self, depth: int, step: int) -> float:
        """One step of one sub-net; returns its seconds."""
        config, engine = self.config, self._runtime.engine
        apply_plan(engine.module, self._plans[depth])
        rate = rate_after(self.step + step, self.policies, config)
        batches = [next(self._batches) for _ in range(config.num_micro_batches(self.groups.world_size))]
        pieces = config.seq_lengths.pieces_at(self.step + step)
        start = time.perf_counter()
        train_step(engine, batches, rate, config.optim.clip_grad, self.groups, pieces)
        synchronize(self.groups.device)
        return time.perf_counter() - start

    def _losses(self, step: int) -> dict[int, float]:
        losses = {}
        for depth, plan in self._plans.items():
            apply_plan(self._runtime.engine.module, plan)
            losses[depth] = mean_loss(self._runtime.engine, self._valid, self.groups)
            if not math.isfinite(losses[depth]):
                raise DivergedError(
                    f"the loss of {depth} layers is {losses[depth]} after {step} steps of the supernet; search with a "
                    f"lower optim.lr, now {self.config.optim.lr:g}"
                )
        return losses


def check_cut(layout: PipelineLayout, growth: Growth, depths: Sequence[int]) -> None:
    """Refuse a pipeline in which a sub-net of the supernet ``growth`` skips all of a chunk.

    The first chunk has the embedding and the last one the output layer; any other would have no weight that it
    computes with, and Megatron-Core's schedules cannot send on what they have received.

    Raises:
        ConfigError: a chunk between the first and the last has no layer at one of ``depths``.
    """
    last = len(layout.counts) - 1
    for depth in depths:
        executed = set(executed_layers(growth, depth))
        for number in range(1, last):
            stage, chunk = number % layout.size, number // layout.size
            layers = layout.chunks(stage)[chunk]
            if executed.isdisjoint(layers):
                skipped = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
                raise ConfigError(
                    f"parallel.pipeline_model_parallel_layout: cut as {layout}, part {number} of the supernet holds "
                    f"{skipped} alone, which the candidate of {depth} layers skips; use fewer pipeline stages or parts"
                )


def recorded_policies(saved: Mapping[str, Any]) -> tuple[tuple[int, RatePolicy], ...]:
    """The learning rate of the stages that a checkpoint with the state ``saved`` has behind it, as the run goes on."""
    return tuple((one["step"], RatePolicy.parse(one["lr_policy"])) for one in saved.get(STAGES_STATE, ()))


def inherited_plan(opened: Opened, config: Config, new: Config, growth: Growth) -> LoopPlan:
    """What the supernet executes: the loops of the checkpoint, in the layers that inherit them."""
    schedule = schedule_of(new)
    hooks, _ = grown_hooks(opened.saved, auto_prog.OPERATOR.name, growth, config, new)
    if GROWTH_STATE in hooks:
        schedule.load_state_dict(hooks[GROWTH_STATE]["schedule"])
    return schedule.plan.inference()
