"""Saving in two phases: every rank writes its part under a temporary name, then rank 0 commits the checkpoint.

    start    an empty folder global_stepN.X.tmp; every rank's state is written into it, or copied to host memory
    write    every rank's files: written, on disk (fsync), described by size and SHA-256
    commit   when all ranks have: the manifest, the folder's name, then ``latest``, each on disk before the next

A run killed at any moment resumes from the previous checkpoint or from this one. Between the phases training may
continue: ``poll`` advances the save as far as possible. (DeepSpeed's own commit is not used: it writes ``latest``
before the other ranks have finished, and syncs nothing.)
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgt import __version__
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.host_copy import Arena
from megatron_sgt.checkpoint.identity import Identity
from megatron_sgt.checkpoint.reshard.deepspeed_info import UNIVERSAL_INFO, universal_info
from megatron_sgt.checkpoint.reshard.sibling import remove_sibling
from megatron_sgt.checkpoint.reshard.stage0 import PARAMETER_NAMES
from megatron_sgt.checkpoint.shard_files import ShardFiles, as_checkpoint_error, redirected_to
from megatron_sgt.compat.quiet import quiet_logs
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import commit, fresh_folder, sync
from megatron_sgt.optim.ema import WeightAverage
from megatron_sgt.parallel.collectives import gather_or_raise, largest, on_rank_zero
from megatron_sgt.parallel.device import synchronize
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import rng_state
from megatron_sgt.planning.pipeline import pipeline_layout

if TYPE_CHECKING:
    import deepspeed

# DeepSpeed's ZeRO options on which the order or the grouping of the numbers in its files depends.
_SHARD_OPTIONS = ("sub_group_size", "round_robin_gradients", "parameter_alignment", "elastic_checkpoint")


def layout_of(config: Config, groups: ParallelGroups) -> dict[str, Any]:
    """All that DeepSpeed's files of a checkpoint depend on: DeepSpeed reads them only under an equal layout."""
    precision = config.precision_on(groups.device.type)
    shape: dict[str, Any] = {
        "tensor_model_parallel_size": groups.tp_size,
        "data_parallel_size": groups.dp_size,
        "zero_stage": config.zero_stage_on(groups.world_size, precision),
        "precision": precision,
        "weight_decay_on": config.optim.weight_decay_on,
    }
    if config.has_bf16_optimizer(precision):
        shape["optimizer"] = "BF16_Optimizer"
    if groups.pp_size > 1:
        shape[layout.PIPELINE_SIZE] = groups.pp_size
        shape[layout.PIPELINE_COUNTS] = list(pipeline_layout(config).counts)
    zero = config.deepspeed.get("zero_optimization", {})
    return shape | {f"deepspeed.zero_optimization.{name}": zero[name] for name in _SHARD_OPTIONS if name in zero}


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint. ``stall_s``: seconds that training waited for it; ``seconds``: in total."""

    step: int
    folder: Path
    num_bytes: int
    stall_s: float
    seconds: float


@dataclass
class _InFlight:
    """A save in progress. ``work``: its running part; ``files``: of all ranks, once written."""

    step: int
    temporary: Path
    state: dict[str, Any]
    begun: float
    work: Future[Any]
    files: manifest.Files | None = None
    stall_s: float = 0.0


class Saver:
    """Saves checkpoints, one at a time; every method is collective.

    Args:
        about: for the manifest (JSON-able).
        may_write: called by rank 0 before each change of the folder, in whatever thread makes it; a LeaseError of it
            (another run holds the folder by now) passes through, and nothing of that run is touched.
        average: of the weights, to be saved beside them.
    """

    def __init__(
        self,
        config: Config,
        engine: deepspeed.DeepSpeedEngine,
        groups: ParallelGroups,
        about: dict[str, Any] | None = None,
        may_write: Callable[[], None] = lambda: None,
        average: WeightAverage | None = None,
    ) -> None:
        self._config = config
        self._may_write = may_write
        self._engine = engine
        self._groups = groups
        self._average = average
        self._root = config.save_dir
        self._about = {
            "code": f"megatron_sgt {__version__}",
            "config_sha256": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
            **(about or {}),
        }
        self._run_id: str | None = None
        self._flight: _InFlight | None = None
        self._arena: Arena | None = None
        self._pool: ThreadPoolExecutor | None = None
        if config.checkpoint.async_save:
            self._arena = Arena(pinned=groups.device.type != "cpu")
            self._pool = ThreadPoolExecutor(1, "checkpoint")

    @property
    def in_flight(self) -> bool:
        return self._flight is not None

    def close(self) -> None:
        """Release the memory and the thread of asynchronous saves; none may be in flight."""
        assert self._flight is None, "settle first"
        if self._pool is not None:
            self._pool.shutdown()
        self._arena = None

    def prepare(self) -> None:
        """Allocate the memory of asynchronous saves, so that the first save is as fast as the others."""
        if self._arena is not None:
            self._arena.reserve(_estimated_bytes(self._engine, self._groups, self._average))

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Begin the save after ``step`` optimizer steps, when no other is in flight. ``state``: of trainer and hooks.

        Raises:
            CheckpointError: on every rank, when the folder cannot be made.
        """
        assert self._flight is None, "one save at a time"
        begun = time.perf_counter()
        name = self._together(step, None, partial(self._fresh, step) if self._groups.is_main else str)[0]
        temporary = self._root / name
        if self._average is not None:
            state = {**state, layout.AVERAGE_STATE: {"decay": self._average.decay}}
        about = Identity(step, layout_of(self._config, self._groups), self._groups.rank)
        files = ShardFiles(self._arena, self._groups.dp_rank, self._groups.dp_size, about)
        _hand_over(files, temporary, self._config, self._engine, self._groups, self._average)
        self._flight = _InFlight(step, temporary, state, begun, self._run(files.finish))
        self._flight.stall_s = time.perf_counter() - begun

    def poll(self, wait: bool = False) -> Saved | None:
        """Advance the save in flight; returns it once it is committed, else None. ``wait``: until it is committed.

        Raises:
            CheckpointError: on every rank, when one of them could not write. Nothing of the save
                remains, and earlier checkpoints are untouched.
        """
        entered = time.perf_counter()
        while (flight := self._flight) is not None:
            if not wait and largest(int(not flight.work.done()), self._groups):
                flight.stall_s += time.perf_counter() - entered
                return None
            outcomes = self._together(flight.step, flight.temporary, flight.work.result)
            if flight.files is None:
                flight.files = {name: file for files in outcomes for name, file in files.items()}
                commits = partial(self._commit, flight) if self._groups.is_main else int
                flight.work = self._run(commits)
                continue
            self._finish()
            now = time.perf_counter()
            stall_s = flight.stall_s + now - entered
            folder = self._root / layout.tag_for(flight.step)
            return Saved(flight.step, folder, outcomes[0], stall_s, now - flight.begun)
        return None

    def _run(self, work: Callable[[], Any]) -> Future[Any]:
        if self._pool is not None:
            return self._pool.submit(work)
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except Exception as error:  # the other ranks wait for the outcome, whatever it is
            future.set_exception(error)
        return future

    def _together(self, step: int, temporary: Path | None, action: Callable[[], Any]) -> list[Any]:
        """``gather_or_raise``; a failure ends the save on every rank and deletes what it has written."""
        try:
            return gather_or_raise(action, self._groups)
        except CheckpointError as error:
            self._finish()
            if temporary is not None:
                on_rank_zero(partial(shutil.rmtree, temporary, ignore_errors=True))
            raise CheckpointError(
                f"cannot write checkpoint {self._root / layout.tag_for(step)}: {error}; earlier checkpoints are "
                "untouched. Make room, or set checkpoint.save to another place, and start again: the run continues "
                "from the newest one"
            ) from error

    def _id_of_run(self) -> str:
        """The same in all checkpoints of this folder, whichever process wrote them."""
        if self._run_id is None:
            self._run_id = manifest.run_of(self._root) or uuid.uuid4().hex
        return self._run_id

    def _finish(self) -> None:
        self._flight = None
        if self._arena is not None:
            self._arena.reset()

    def _fresh(self, step: int) -> str:
        """Make an empty folder for the save, and return its name, which no other process ever has.

        A run that was stopped inside a save, and goes on after another has taken its folder over, finds nothing under
        the name that it knows; it would write into the other's save of the same step.
        """
        with as_checkpoint_error():
            self._may_write()
            temporary = self._root / f"{layout.tag_for(step)}.{secrets.token_hex(4)}{layout.TEMPORARY_SUFFIX}"
            fresh_folder(temporary)
            return temporary.name

    def _commit(self, flight: _InFlight) -> int:
        self._may_write()
        where = layout_of(self._config, self._groups)
        samples = flight.state["trainer"].get("consumed_samples", 0)
        about = {
            "step": flight.step,
            "tokens": samples * self._config.model.seq_length,
            "layout": where,
            **self._about,
            "run": self._id_of_run(),
            **({layout.ORIGIN_STATE: origin} if (origin := flight.state.get(layout.ORIGIN_STATE)) else {}),
            "growth": growth_fingerprint(flight.state),
        }
        temporary, final = flight.temporary, self._root / layout.tag_for(flight.step)
        assert flight.files is not None
        with as_checkpoint_error():
            layout.write_json(temporary / layout.STATE_FILE, {**flight.state, "layout": where})
            (temporary / layout.CONFIG_FILE).write_text(self._config.to_yaml(), encoding="utf-8")
            # Ours, and what optimizer offload to NVMe has copied there beside the ranks' files.
            others = [name for name in layout.file_sizes(temporary) if name not in flight.files]
            for name in others:
                sync(temporary / name)
            files = flight.files | manifest.describe_files(temporary, others)
            if missing := layout.expected_files(where, layout.AVERAGE_STATE in flight.state) - set(files):
                raise CheckpointError(f"files of this layout are missing: {', '.join(sorted(missing)[:5])}")
            manifest.write_manifest(temporary, {**about, "tag": final.name}, files)
            self._may_write()
            if final.exists():  # the same step again, after a resume from an older checkpoint
                remove_sibling(final)
                layout.remove(final)
                self._may_write()
            commit(temporary, final)
            self._may_write()
            layout.point_to(self._root, final.name)
        keep_last = self._config.checkpoint.keep_last
        ends = {record["step"] for record in flight.state.get(layout.STAGES_STATE, ())}
        self._may_write()
        with suppress(FileNotFoundError):  # somebody else has deleted it
            for pruned in layout.prune(self._root, keep_last, self._config.milestone_interval, ends):
                remove_sibling(self._root / pruned)
        return sum(file["bytes"] for file in files.values())


def growth_fingerprint(state: dict[str, Any]) -> str | None:
    """A hash of the growth hook's state: checkpoints with equal hashes have grown equally."""
    growth = state.get("hooks", {}).get(layout.GROWTH_STATE)
    return None if growth is None else manifest.digest(growth)


def _hand_over(
    files: ShardFiles,
    temporary: Path,
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
    average: WeightAverage | None,
) -> None:
    with quiet_logs(), redirected_to(files, engine):  # DeepSpeed reports every file on every rank
        engine.save_checkpoint(
            str(temporary.parent),
            tag=temporary.name,
            client_state=_client_state(config, engine),
            save_latest=False,
        )
    if groups.dp_rank and engine.zero_optimization_stage() < 3:
        files.save_share(engine.module.state_dict(), temporary / layout.model_file(groups.mp_rank))
    if average is not None and _has_own_part(engine, groups):
        file = layout.average_file(layout_of(config, groups), groups.mp_rank, groups.dp_rank)
        files.save(average.state_dict(), temporary / file)
    files.save(rng_state(groups.device), temporary / layout.rng_file(groups.rank))
    synchronize(groups.device)


def _client_state(config: Config, engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What readers of DeepSpeed's files need beside their content."""
    state: dict[str, Any] = {UNIVERSAL_INFO: universal_info(config.model)}
    if engine.zero_optimization_stage() == 0:
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        groups = engine.optimizer.param_groups
        state[PARAMETER_NAMES] = [names[id(p)] for group in groups for p in group["params"]]
    return state


def _has_own_part(engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups) -> bool:
    """Whether this rank has optimizer state to write: at ZeRO 0 all data-parallel ranks have the first one's."""
    return bool(engine.zero_optimization_stage()) or groups.dp_rank == 0


def _estimated_bytes(
    engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups, average: WeightAverage | None = None
) -> int:
    """Bytes of this rank's state, slightly overestimated; AdamW's moments appear with the first step."""
    parameters = list(engine.module.parameters())
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    stage = engine.zero_optimization_stage()
    weights = 0
    if stage < 3:  # shares of whole tensors differ by the largest of them
        largest_one = max(p.numel() for p in parameters) if groups.dp_size > 1 else 0
        weights = (count // groups.dp_size + largest_one) * parameters[0].element_size()
    optimizer = 8 * count if stage == 0 else 12 * -(-count // groups.dp_size)
    optimizer += 0 if average is None else average.num_bytes
    if not _has_own_part(engine, groups):
        optimizer = 0
    return int(1.02 * (weights + optimizer)) + (1 << 22)
