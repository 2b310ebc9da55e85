"""What would stop a run, found before it starts: by the run, its dry run, and the login node that submits it.

No torch. A login node may lack NumPy and the tokenizer's library, too: ``check_job`` does without them.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint.find import (
    Found,
    check_added,
    check_checkpoint,
    find_checkpoint,
    starts_fresh,
    verify_quickly,
)
from megatron_sgt.checkpoint.forms import read_config, read_state
from megatron_sgt.checkpoint.layout import GROWTH_STATE, ORIGIN_STATE
from megatron_sgt.checkpoint.new_run import check_weights, new_state
from megatron_sgt.config import Config
from megatron_sgt.config.lengths import SequenceLengths
from megatron_sgt.config.phases import phases_text
from megatron_sgt.data.export_form import export_problems
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.tokenizer import resolve_vocab_size, tokenizer_of
from megatron_sgt.errors import CheckpointError, ConfigError, DamagedCheckpointError, DataError
from megatron_sgt.files import nearest, unwritable
from megatron_sgt.metrics.lines import began
from megatron_sgt.metrics.units import file_size
from megatron_sgt.metrics.writers import check_packages
from megatron_sgt.planning.kept import kept_text
from megatron_sgt.planning.layout import batch_line, layout_line
from megatron_sgt.planning.parameters import checkpoint_bytes
from megatron_sgt.planning.phases import phase_lines

# Settings that decide where and how a run is watched, not what it computes.
_UNREMARKABLE = (
    "checkpoint.",
    "logging.",
    "evaluation.",
    "train.exit_interval",
    "train.threads_per_rank",
    "train.hang_timeout_seconds",
    "train.slow_phase_timeout_seconds",
    "train.straggler_threshold",
    "train.replica_check_interval",
    "data.data_path",  # said with what it makes of the data
    "data.num_workers",
    "data.allow_validation_leak",
    "data.allow_changed_data",
    "huggingface.",
)
# Settings on which the meaning of the weights depends that another run has trained.
_OF_WEIGHTS = ("model.", "data.tokenizer")
_LENGTHS = "data.seq_length_curriculum"
# What reading the data sets and the tokenizer needs.
_READERS = {None: (), "sentencepiece": ("sentencepiece",), "huggingface": ("transformers",)}


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or from nothing (``folder`` None).

    ``saved``: the checkpoint's JSON state; ``changed``: settings that the checkpoint was saved with otherwise, as
    "train.train_iters 8 -> 12"; ``skipped``: damaged ones that were passed over; ``explicit``: the user named the
    checkpoint. ``weights``: what of the checkpoint a new run begins with (checkpoint.weights), which takes nothing else
    of it, so that ``saved`` is the new run's; None: the run goes on.
    """

    folder: Path | None
    saved: dict[str, Any]
    changed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    explicit: bool = False
    weights: str | None = None

    def problem(self, config: Config) -> str | None:
        """Why there is nothing to train, None if there is."""
        wanted = config.train.train_iters
        if self.folder is None or self.saved["trainer"]["step"] < wanted:
            return None
        return (
            f"nothing to do: {self.folder} is at step {self.saved['trainer']['step']:,} of {wanted:,}; raise "
            "train.train_iters to go on"
        )

    def sentence(self, config: Config) -> str:
        """Whether the run starts fresh, from checkpoint.load or from its own newest checkpoint."""
        if self.folder is None:
            return f"FRESH START: no checkpoint in {config.save_dir}"
        if self.weights is not None:
            return f"NEW RUN of {config.train.train_iters:,} steps with {began(self.saved[ORIGIN_STATE])}"
        step, wanted = self.saved["trainer"]["step"], config.train.train_iters
        passed = f" (passed over: {'; '.join(self.skipped)})" if self.skipped else ""
        verb = "START" if self.explicit else "RESUME"
        return f"{verb} at step {step:,} of {wanted:,} from {self.folder}{passed}"


def with_vocabulary(config: Config) -> Config:
    """``config`` with model.vocab_size taken from the tokenizer where it was left null.

    Raises:
        DataError: the tokenizer cannot be read or has more tokens than model.vocab_size.
    """
    return config.with_vocab_size(resolve_vocab_size(config.model.vocab_size, tokenizer_of(config.data)))


def check_folders(config: Config) -> None:
    """Check that the folders of the run can be made or written.

    Raises:
        ConfigError: one cannot.
    """
    for option, folder in (
        ("logging.run_dir", Path(config.logging.run_dir)),
        ("checkpoint.save", config.save_dir),
    ):
        reason = unwritable(folder)
        if reason is not None:
            raise ConfigError(f"{option}: cannot write to {folder}: {reason}; choose another folder")


def check_surroundings(config: Config) -> None:
    """Check the packages and folders that the run needs.

    Raises:
        ConfigError: a package that logging or evaluation asks for is missing, or a folder can be neither made nor
            written.
    """
    check_packages(config.logging)
    if config.evaluation.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.tasks is set, but lm-evaluation-harness is not installed: run "
            "'pip install megatron-sgt[eval]', or remove evaluation.tasks"
        )
    check_folders(config)


def check_export(config: Config) -> list[str]:
    """What an export of the run cannot keep, or may not, a sentence each (huggingface.check_at_start).

    Raises:
        ConfigError: something it certainly cannot, where the setting is error.
        DataError: the tokenizer cannot be read.
    """
    setting = config.huggingface.check_at_start
    found = [] if setting == "off" else list(export_problems(config))
    if setting == "error" and (certain := [line for line, is_certain in found if is_certain]):
        raise ConfigError(
            f"huggingface.check_at_start: is error, and no checkpoint of this run could be exported: "
            f"{'; '.join(certain)}. Change that, or set check_at_start to warn"
        )
    return [line for line, _ in found]


def check_disk(config: Config, precision: str, libraries: bool = True) -> str:
    """The room for checkpoints and the size of one, in words; of a model that grows, the largest.

    Args:
        libraries: False leaves out what needs NumPy: the stages after the first.

    Raises:
        CheckpointError: not one fits.
        ConfigError: the stages of the run are refused.
    """
    if config.model.vocab_size is None:  # the tokenizer's, which may not be readable here
        config = config.with_vocab_size(1)
    size = checkpoint_bytes(config, precision)
    stages = config.growth.stages if libraries else ()
    if stages:
        from megatron_sgt.planning.stages import largest_checkpoint  # needs NumPy

        size = largest_checkpoint(config, precision)
    free = shutil.disk_usage(nearest(config.save_dir)).free
    if free < size:
        raise CheckpointError(
            f"a checkpoint takes about {file_size(size)}, but {config.save_dir} has {file_size(free)} free; "
            "make room, or set checkpoint.save to another place"
        )
    each, kept = "the largest" if stages else "each", kept_text(config, len(stages))
    return f"about {file_size(size)} {each}, {kept}; {file_size(free)} free for {config.save_dir}"


def find_start(config: Config, damaged: Mapping[Path, str] | None = None, libraries: bool = True) -> Start:
    """Find the checkpoint that the run continues from, and check that it is whole (by sizes) and fits.

    A vocabulary that only the tokenizer knows is taken from the checkpoint.

    Args:
        damaged: checkpoints that were found to be damaged already, and how.
        libraries: False leaves out what needs NumPy or the tokenizer's library: growth and the tokenizer.

    Raises:
        CheckpointError: nothing at checkpoint.load, a damaged checkpoint, another model, tokenizer or growth.
        ConfigError: growth.ramp is of a later step.
    """
    known = dict(damaged or {})
    while True:
        found = find_checkpoint(config, known)
        if found.folder is None:
            check_added(config.growth.ramp, 0)
            return Start(None, {})
        try:
            return _start_at(found.folder, found, config, libraries)
        except DamagedCheckpointError as error:
            if found.explicit:
                raise
            known[found.folder] = str(error)


def _start_at(folder: Path, found: Found, config: Config, libraries: bool) -> Start:
    if found.explicit:  # find_checkpoint has looked at the others
        verify_quickly(folder)
    there = read_config(folder)
    if config.model.vocab_size is None and there.model.vocab_size is not None:
        config = config.with_vocab_size(there.model.vocab_size)
    tokenizer = tokenizer_fingerprint(config) if libraries else None
    if found.explicit and config.checkpoint.start == "weights":
        return _new_run(folder, found, config, tokenizer, libraries)
    if libraries:
        from megatron_sgt.checkpoint.place import check_past_phases, place_of  # needs NumPy

        state = read_state(folder)
        check_past_phases(folder, there, config, state["trainer"]["step"])
        config = place_of(config, folder, state, there.model).there.config
    elif config.growth.stages:  # which of them it belongs to is not known here
        config = config.model_copy(update={"model": there.model})
    saved = check_checkpoint(folder, config, tokenizer)
    if libraries:
        _check_growth(folder, saved, config, there)
    changes = tuple(_changes(there, config, saved["trainer"]["step"]))
    return Start(folder, saved, changes, found.skipped, found.explicit)


def _new_run(folder: Path, found: Found, config: Config, tokenizer: str | None, libraries: bool) -> Start:
    """The start of a run with the weights of ``folder``."""
    whole = verify_quickly(folder)
    if libraries:
        from megatron_sgt.stages.stages import stages_of  # needs NumPy

        config = stages_of(config)[0].config
    elif config.growth.stages:  # the first model is not known here
        config = config.model_copy(update={"model": whole.config.model})
    there = whole.config.at_step(whole.state["trainer"]["step"])
    other = check_weights(folder, whole, config, tokenizer)
    changed = (line for line in _changes(there, config, 0) if line.startswith(_OF_WEIGHTS))
    saved = new_state(folder, whole, config, libraries)
    return Start(folder, saved, (*changed, *other), found.skipped, True, config.checkpoint.weights)


def tokenizer_fingerprint(config: Config) -> str | None:
    """What a checkpoint remembers of the tokenizer, None without one.

    Raises:
        DataError: it cannot be read.
    """
    tokenizer = tokenizer_of(config.data)
    return None if tokenizer is None else tokenizer.fingerprint()


def check_job(config: Config, world_size: int, device: str) -> list[tuple[str, str]]:
    """Check what can be checked where a job is submitted; returns (subject, finding) rows.

    The start of the run checks more (``pretrain_sgt.py --dry-run`` shows it), but that needs torch.

    Args:
        device: kind of device that the ranks will train on, as in parallel.device.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that would stop the run.
    """
    precision = config.precision_on(device)
    shape, batch = layout_line(config, world_size, precision), batch_line(config, world_size)
    check_folders(config)
    tokenizer = config.data.tokenizer
    needed = ("numpy", *_READERS[None if tokenizer is None else tokenizer.type])
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    data, disk = _data_line(config, absent), check_disk(config, precision, libraries="numpy" not in absent)
    exported = [] if absent else check_export(config)
    start = find_start(config, libraries=not absent)
    if problem := start.problem(config):
        raise ConfigError(problem)
    return [
        ("layout", shape),
        ("batch", batch),
        *(("phase", line) for line in phase_lines(config)),
        *_stages_row(config, absent),
        *_pipeline_rows(config, world_size, absent),
        ("data", data),
        ("disk", disk),
        ("start", start.sentence(config)),
        *(("WARNING", line) for line in exported),
    ]


def _stages_row(config: Config, absent: Sequence[str]) -> list[tuple[str, str]]:
    """The models that the run passes through, if it is not one; refuses those that cannot be trained."""
    if not config.growth.stages:
        return []
    if "numpy" in absent:
        return [("stages", f"{1 + len(config.growth.stages)}, not checked: no numpy here; the job checks them first")]
    from megatron_sgt.planning.describe import stages_line  # needs NumPy
    from megatron_sgt.stages.stages import stages_of

    known = config if config.model.vocab_size is not None else config.with_vocab_size(1)
    return [("stages", stages_line(stages_of(known)))]


def _pipeline_rows(config: Config, world_size: int, absent: Sequence[str]) -> list[tuple[str, str]]:
    """How a pipeline cuts the models, if there is one."""
    if config.parallel.pipeline_model_parallel_size == 1:
        return []
    if absent:
        return [("pipeline", f"cut where the job starts: no {absent[0]} here")]
    from megatron_sgt.planning.describe import pipeline_lines  # needs NumPy
    from megatron_sgt.stages.stages import stages_of

    lines = pipeline_lines(stages_of(with_vocabulary(config)), world_size)
    return [("pipeline", line) for line in lines]


def _data_line(config: Config, absent: Sequence[str]) -> str:
    """Read the data sets as the run will, or at least find their files where a library for reading is ``absent``."""
    if not absent:
        from megatron_sgt.data.sources import validate_data

        return validate_data(config).line()
    if config.data.dataset != "indexed":
        return f"'{config.data.dataset}', read when the run starts"
    if not config.data.data_path:
        raise DataError("data.data_path is empty; give the prefix of a .bin/.idx pair")
    prefixes = [resolve_prefix(path)[0] for path in (*config.data_prefixes, *config.data.valid.values())]
    tokenizer = config.data.tokenizer
    if tokenizer is not None and tokenizer.type == "sentencepiece" and not Path(tokenizer.model).is_file():
        raise DataError(f"data.tokenizer.model: no such file: {tokenizer.model}")
    return f"{len(set(prefixes))} data sets found, not read: no {', no '.join(absent)} here; the job reads them first"


def _check_growth(folder: Path, saved: dict[str, Any], config: Config, there: Config) -> None:
    """``there``: the configuration in the checkpoint. A state that does not even fit that one is damaged."""
    if starts_fresh(saved, GROWTH_STATE):
        return
    from megatron_sgt.growth import build_schedule  # needs NumPy

    if GROWTH_STATE not in saved["hooks"]:
        raise DamagedCheckpointError(f"checkpoint {folder} holds no growth state")
    state = saved["hooks"][GROWTH_STATE]["schedule"]
    schedule = build_schedule(config.growth, config.model.num_layers, config.model.num_attention_heads)
    try:
        schedule.load_state_dict(state)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {error}") from error
    except CheckpointError as error:
        same = there.growth == config.growth and there.growth.replay is None
        kind = DamagedCheckpointError if same else CheckpointError
        raise kind(f"checkpoint {folder}: {error}") from error
    if (schedule.acted_until or 0) > saved["trainer"]["step"]:
        raise DamagedCheckpointError(f"checkpoint {folder}: its growth state is of a later step")


def _changes(there: Config, here: Config, step: int) -> Iterator[str]:
    """Settings of the run that differ from those of the checkpoint, which is of ``step``."""
    before, now = dict(_leaves(there.model_dump())), dict(_leaves(here.model_dump()))
    for name in before | now:
        if before.get(name) == now.get(name) or name.startswith(_UNREMARKABLE):
            continue
        if name == "phases":
            yield f"phases {phases_text(there)} -> {phases_text(here)}"
        elif name == _LENGTHS:
            yield _other_lengths(there.seq_lengths, here.seq_lengths, step)
        else:
            yield f"{name} {before.get(name)} -> {now.get(name)}"


def _other_lengths(before: SequenceLengths, now: SequenceLengths, step: int) -> str:
    trained = [list(lengths.within(1, step)) if step else [] for lengths in (before, now)]
    past = "" if trained[0] == trained[1] else f" (of the {step:,} steps that are trained, too: they stay as they were)"
    return f"{_LENGTHS} {before.text() or 'none'} -> {now.text() or 'none'}{past}"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
