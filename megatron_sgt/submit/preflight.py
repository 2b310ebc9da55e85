"""What would stop a job soon after its start, found before it waits in a queue.

The start of the run checks more (`pretrain_sgt.py --dry-run` shows it), but that needs torch.
"""

import importlib.util
from pathlib import Path

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.find import check_checkpoint, find_checkpoint
from megatron_sgt.checkpoint.size import check_disk, checkpoint_bytes
from megatron_sgt.cli import unwritable
from megatron_sgt.config import Config, load_config
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.metrics.units import file_size

# What reading the data sets and the tokenizer needs. A login node may lack it.
_READERS = {None: (), "sentencepiece": ("sentencepiece",), "huggingface": ("transformers",)}


def preflight(config: Config, world_size: int, device: str) -> list[tuple[str, str]]:
    """Check batch arithmetic, folders, data, disk space and checkpoint of a run; returns (subject, finding) rows.

    device: kind of device that the ranks will train on, as in parallel.device.
    Raises ConfigError, DataError, CheckpointError: the first thing that would stop the run.
    """
    accumulation = config.num_micro_batches(world_size)
    precision = config.precision_on(device)
    for option, folder in (
        ("logging.run_dir", Path(config.logging.run_dir)),
        ("checkpoint.save", config.save_dir),
    ):
        reason = unwritable(folder)
        if reason is not None:
            raise ConfigError(f"{option}: cannot write to {folder}: {reason}; choose another folder")
    train, parallel = config.train, config.parallel
    data_parallel = config.data_parallel_size(world_size)
    shape = (
        f"{world_size} ranks = tensor parallel {parallel.tensor_model_parallel_size} x data parallel {data_parallel}"
        f" · ZeRO-{config.zero_stage_on(world_size, precision)} · {precision}"
    )
    batch = (
        f"{train.global_batch_size} = micro {train.micro_batch_size} x accumulation {accumulation} x "
        f"data parallel {data_parallel}"
    )
    return [
        ("layout", shape),
        ("batch", batch),
        ("data", _check_data(config)),
        ("disk", _check_disk(config, precision)),
        ("start", find_start(config)),
    ]


def _check_data(config: Config) -> str:
    """Read the data sets as the run will, or at least find their files where NumPy or the tokenizer's library is
    absent."""
    tokenizer = config.data.tokenizer
    needed = ("numpy", *_READERS[None if tokenizer is None else tokenizer.type])
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if not absent:
        from megatron_sgt.data.sources import validate_data

        return validate_data(config).line()
    if not config.data.data_path:
        raise DataError("data.data_path is empty; give the prefix of a .bin/.idx pair")
    prefixes = [resolve_prefix(path)[0] for _, path in config.data.blend()]
    if tokenizer is not None and tokenizer.type == "sentencepiece" and not Path(tokenizer.model).is_file():
        raise DataError(f"data.tokenizer.model: no such file: {tokenizer.model}")
    return (
        f"{len(prefixes)} data sets found, not read: no {', no '.join(absent)} here; the job reads them first"
    )


def _check_disk(config: Config, precision: str) -> str:
    if config.model.vocab_size is None:  # the tokenizer's, which may not be readable here
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 1})})
    _, free = check_disk(config, precision)
    keep = config.checkpoint.keep_last
    size = file_size(checkpoint_bytes(config, precision))
    return f"{file_size(free)} free for checkpoints of {size}, {f'{keep} kept' if keep else 'all kept'}"


def _with_vocabulary_of(folder: Path, config: Config) -> Config:
    """``config``; a vocabulary that only its tokenizer knows, which may not be readable here, is the checkpoint's."""
    if config.model.vocab_size is not None:
        return config
    size = load_config(folder / layout.CONFIG_FILE).model.vocab_size
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def find_start(config: Config) -> str:
    """Whether the run will start afresh, from checkpoint.load or from its own newest checkpoint, in one sentence.

    Raises CheckpointError: checkpoint.load holds none, all are damaged, or it is another model's. ConfigError: the
    run is done.
    """
    found = find_checkpoint(config)
    folder = found.folder
    if folder is None:
        return f"FRESH START: no checkpoint in {config.save_dir}"
    check_checkpoint(folder, _with_vocabulary_of(folder, config))
    verb = "START" if found.explicit else "RESUME"
    step, wanted = layout.step_of(folder.name), config.train.train_iters
    if step >= wanted:
        raise ConfigError(
            f"nothing to do: {folder} is at step {step:,} of {wanted:,}; raise train.train_iters to go on"
        )
    passed = f" (passed over: {'; '.join(found.skipped)})" if found.skipped else ""
    return f"{verb} at step {step:,} of {wanted:,} from {folder}{passed}"
