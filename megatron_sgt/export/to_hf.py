"""Writes a checkpoint of any layout as a Hugging Face folder; streaming, on a CPU, without a process group."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.errors import CheckpointError, LeaseError, SGTError
from megatron_sgt.export.architecture import WrittenTokenizer, hf_config, plain_architecture
from megatron_sgt.export.card import model_card
from megatron_sgt.export.forms import STANDARD, Form
from megatron_sgt.export.hf.tokenizer import write_tokenizer
from megatron_sgt.export.hf.tokenizer_files import NONE
from megatron_sgt.export.inherited import GENERATION_FILE, config_ids, generation_values
from megatron_sgt.export.shards import write_weights
from megatron_sgt.export.source import ExportSource, open_checkpoint
from megatron_sgt.files import commit, fresh_folder, sync_all, temporary_of, write_json, write_text
from megatron_sgt.growth import LoopPlan
from megatron_sgt.lease import Lease, beside, held
from megatron_sgt.model.mcore_config import DTYPES

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    dtype: "fp32", "bf16" or "fp16", of the stored weights. form: of a model that is not plain. averaged: the moving
    average of the weights (train.ema_decay) instead of them. training_gates: inside a decay window, the gates of the
    saved step instead of those of inference. keep_padding: keep the rows that pad the vocabulary. tokenizer: instead
    of the one in the checkpoint's configuration; write_tokenizer: False leaves it out. max_shard_bytes: of one
    weight file. chat_template: of the tokenizer, as in ``chat_template_of``. license: that the card names.
    """

    dtype: str = "bf16"
    form: Form = STANDARD
    averaged: bool = False
    training_gates: bool = False
    keep_padding: bool = False
    tokenizer: TokenizerConfig | None = None
    write_tokenizer: bool = True
    chat_template: str = NONE
    max_shard_bytes: int = MAX_SHARD_BYTES
    license: str | None = None


@dataclass(frozen=True)
class Export:
    """A finished export.

    form: None where the model is plain. drift: largest difference between the checkpoint's copies of a replicated
    weight.
    """

    folder: Path
    source: ExportSource
    plan: LoopPlan
    options: ExportOptions
    form: Form | None
    architecture: str
    why: str
    tokenizer_notes: tuple[str, ...]
    weight_bytes: int
    drift: float


def export_checkpoint(
    load: Path, output: Path, *, step: int | None = None, options: ExportOptions | None = None
) -> Export:
    """Write the checkpoint ``load`` (a folder of checkpoints, or one of them) as the Hugging Face folder ``output``.

    The folder is renamed into place when it is complete. Peak memory is a few times the largest parameter.

    Args:
        step: which checkpoint of a folder of them; None: the latest.

    Raises:
        CheckpointError: the checkpoint or its tokenizer cannot be read or exported, ``output`` exists or cannot be
            written.
    """
    options = options or ExportOptions()
    if output.exists():
        raise CheckpointError(f"{output} exists already; choose another folder, or delete it")
    source = open_checkpoint(load, step, options.keep_padding, options.averaged)
    plan = source.plan(options.training_gates)
    with _whole_or_nothing(output) as temporary:
        return _write(source, plan, options, temporary, output)


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to write into, renamed to ``output`` at the end; after an error nothing is left."""
    temporary = temporary_of(output)
    lease = Lease(beside(output), "an export", "choose another --output", output)
    try:
        with held(lease):
            fresh_folder(temporary)
            try:
                yield temporary
                sync_all(temporary)
                lease.check()
                commit(temporary, output)
            except BaseException:
                with suppress(LeaseError):  # what lies there may be another's by now
                    lease.check()
                    shutil.rmtree(temporary, ignore_errors=True)
                raise
    except CheckpointError:
        raise
    except SGTError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error


def _write(source: ExportSource, plan: LoopPlan, options: ExportOptions, temporary: Path, output: Path) -> Export:
    model = source.config.model
    tokenizer = WrittenTokenizer()
    wanted = (options.tokenizer or source.config.data.tokenizer) if options.write_tokenizer else None
    if wanted is not None:
        # Before the weights: it is the part most likely to be missing, and quickly checked.
        tokenizer = write_tokenizer(wanted, temporary, source.config, options.chat_template)
    plain, why = plain_architecture(model, plan, tokenizer.like_qwen)
    drifts = [0.0]

    def stream() -> Iterator[tuple[str, Tensor]]:
        for weight in source.weights():
            tensors, drift = source.read(weight)
            drifts[0] = max(drifts[0], drift)
            while tensors:
                name = next(iter(tensors))
                yield name, tensors.pop(name)

    size = write_weights(temporary, source.names, stream(), DTYPES[options.dtype], options.max_shard_bytes)
    rows = source.vocab_rows
    config = hf_config(model, plan, rows, options.dtype, tokenizer.ids, options.form, tokenizer.like_qwen)
    config |= config_ids(source.imported)
    unused = range(model.vocab_size or source.vocab_rows, source.vocab_rows)
    write_json(temporary / "config.json", config)
    write_json(temporary / GENERATION_FILE, generation_values(source.imported, tokenizer.ids, unused))
    form = options.form if plain is None else None
    for name in form.files if form else ():
        shutil.copyfile(Path(__file__).parent / "hf" / name, temporary / name)
    notes = None if wanted is None else tokenizer.notes
    card = model_card(source, plan, config, options.training_gates, notes, options.license)
    write_text(temporary / "README.md", card)
    architecture = plain or options.form.architecture
    return Export(output, source, plan, options, form, architecture, why, tokenizer.notes, size, drifts[0])
