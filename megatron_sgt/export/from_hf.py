"""Imports a Hugging Face folder as a checkpoint from which a run starts, under any layout.

The result is layout-free: whole fp32 weights under Hugging Face names, no optimizer state, step 0. One tensor is
in memory at a time, with its fp32 copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.forms import IMPORTED_FROM, LAYOUT_FREE
from megatron_sgt.checkpoint.reshard.layout_free import file_name
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.checkpoint.reshard.tensor_file import TensorFileWriter
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError, DataError, LeaseError
from megatron_sgt.export.continued_run import RUN_FILE, fitting_config, growth_state, run_config, run_yaml
from megatron_sgt.export.hf.families import HFModel, read_config, read_model
from megatron_sgt.export.hf_tensors import HFTensors
from megatron_sgt.export.inherited import read_inherited
from megatron_sgt.export.tokenizers import (
    TOKENIZER_FOLDER,
    check_tokenizers,
    copy_tokenizer,
    tokenizer_at,
    tokenizer_in,
)
from megatron_sgt.files import fresh_folder, replace_text, temporary_of
from megatron_sgt.lease import Lease, held, inside
from megatron_sgt.model.hf_weights import check_tensors
from megatron_sgt.model.rotary import scaled_frequencies

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FREQUENCIES = ".self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Imported:
    """What ``import_model`` has written. ``padding_rows``: added to the vocabulary of the model.

    ``config_file``: None where the user gave one.
    """

    folder: Path
    model: HFModel
    config: Config
    config_file: Path | None
    num_bytes: int
    num_parameters: int
    stored_as: tuple[str, ...]
    padding_rows: int
    left_out: tuple[str, ...]
    """Files of weights in the folder that are no part of the model."""


def import_model(
    source: Path,
    root: Path,
    config_file: Path | None = None,
    seq_length: int | None = None,
    padding: int | None = None,
    base_model: str | None = None,
) -> Imported:
    """Write the model of the Hugging Face folder ``source`` as checkpoint 0 below ``root``.

    Args:
        config_file: of the run that will continue it; None: one is written to ``root``, with ``seq_length`` and
            ``padding`` as in ``run_config``.
        base_model: a hub's name for the model; None: that of a folder in the hub's cache (``read_inherited``).

    Raises:
        CheckpointError: a model that does not fit; a tensor is missing, left over or of the wrong shape; a shard
            is missing or damaged; ``root`` holds checkpoints, or cannot be written; the folder's tokenizer, or the
            configuration's, cannot be read or has more tokens than the model.
        ConfigError: ``config_file`` is wrong or of another model.
    """
    model, tensors = read_model(source), HFTensors(source)
    inherited = read_inherited(source, read_config(source), base_model)
    tokenizer = tokenizer_in(source)
    if config_file is None:
        moved = None if tokenizer is None else tokenizer_at(root / TOKENIZER_FOLDER, tokenizer)
        config = run_config(model, root, moved, seq_length, padding)
    else:
        config = fitting_config(config_file, model)
    _drop_derived(source, tensors, config.model)
    _check_rows(source, tensors, config.model)
    try:
        fingerprint = check_tokenizers(source, tokenizer, config if config_file else None, model.fields["vocab_size"])
    except DataError as error:  # part of the model that was asked for
        raise CheckpointError(str(error)) from error
    final = root / layout.tag_for(0)
    with _all_or_nothing(root, final) as (temporary, lease):
        _write_weights(tensors, config.model, temporary)
        state = _state(f"{source} ({model.model_type})", growth_state(model, config), inherited)
        lease.check()
        num_bytes = _commit(state, config, fingerprint, temporary, final)
        if tokenizer is not None:
            copy_tokenizer(source, root / TOKENIZER_FOLDER, tokenizer)
        written = None
        if config_file is None:
            written = root / RUN_FILE
            replace_text(written, run_yaml(config, source, written, bool(model.loops)))
        lease.check()
        layout.point_to(root, final.name)
    return Imported(
        folder=final,
        model=model,
        config=config,
        config_file=written,
        num_bytes=num_bytes,
        num_parameters=sum(torch.Size(shape).numel() for shape in tensors.shapes.values()),
        stored_as=tuple(sorted({str(dtype).removeprefix("torch.") for dtype in tensors.dtypes.values()})),
        padding_rows=config.model.padded_vocab_size() - model.fields["vocab_size"],
        left_out=tensors.left_out,
    )


def _state(origin: str, hooks: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
    made = {
        "version": 1,
        "source_layout": None,
        IMPORTED_FROM: origin,
        "optimizer_step": 0,
        "loss_scale": None,
    }
    return {
        "trainer": {"step": 0, "consumed_samples": 0, "skipped_steps": 0, "consecutive_skipped": 0},
        "hooks": hooks,
        "layout": None,
        LAYOUT_FREE: made,
        layout.IMPORTED_STATE: inherited,
    }


def _commit(state: dict[str, Any], config: Config, tokenizer: str | None, temporary: Path, final: Path) -> int:
    """Complete the folder and rename it; returns its size in bytes. ``tokenizer``: its fingerprint."""
    layout.write_json(temporary / layout.STATE_FILE, state)
    (temporary / layout.CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    about = {"step": 0, "layout": None, "tokenizer": tokenizer}
    return manifest.commit_folder(temporary, final, about)


@contextmanager
def _all_or_nothing(root: Path, final: Path) -> Iterator[tuple[Path, Lease]]:
    """A temporary folder below ``root``, and what holds it; on an error everything that was made is deleted."""
    temporary = temporary_of(final)
    names = (TOKENIZER_FOLDER, RUN_FILE, layout.LATEST_FILE, layout.ITERATION_FILE)
    ours = [temporary, final, *(root / name for name in names)]
    doomed = [path for path in ours if not path.exists()] if root.exists() else [root]
    lease = Lease(inside(root), "an import", "choose another --output")
    try:
        with held(lease):
            if layout.finished_tags(root):  # by one that has just ended
                doomed = []
                raise CheckpointError(f"{root} holds checkpoints already; choose another folder for the import")
            fresh_folder(temporary)
            try:
                yield temporary, lease
            except BaseException:
                lease.check()  # one that has lost it deletes nothing
                raise
    except LeaseError:  # nothing of ours is there
        raise
    except BaseException as error:
        for path in doomed:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        if isinstance(error, OSError):
            raise CheckpointError(f"{final} cannot be written: {error}") from error
        raise


def _drop_derived(source: Path, tensors: HFTensors, model: ModelConfig) -> None:
    """Drop what older versions of transformers stored redundantly, after checking it.

    The head of a tied model is its embedding; the rotary frequencies follow from theta and the scaling.
    """
    if HEAD in tensors.shapes and not model.untie_embeddings_and_output_weights:
        if tensors.shapes[HEAD] != tensors.shapes.get(EMBEDDING) or not torch.equal(
            tensors.read(HEAD), tensors.read(EMBEDDING)
        ):
            raise CheckpointError(
                f"{source}: tie_word_embeddings is true but {HEAD} differs from {EMBEDDING}; set it to false in "
                "config.json if the head is a weight of its own"
            )
        tensors.forget(HEAD)
    size = model.kv_channels
    expected = model.rotary_base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaled, _ = scaled_frequencies(model)
    expected = expected if scaled is None else scaled.double()
    for name in [name for name in tensors.shapes if name.endswith(_FREQUENCIES)]:
        found = tensors.read(name).double()
        # The stored ones may have been rounded to bf16.
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=0):
            raise CheckpointError(f"{source}: {name} differs from the frequencies of theta {model.rotary_base}")
        tensors.forget(name)


def _check_rows(source: Path, tensors: HFTensors, model: ModelConfig) -> None:
    try:
        # Exactly the vocabulary of config.json: a folder has no padding of ours.
        check_tensors(tensors.shapes, model.model_copy(update={"make_vocab_size_divisible_by": 1}))
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not fit its own config.json: {error}") from error


def _write_weights(tensors: HFTensors, model: ModelConfig, destination: Path) -> None:
    shapes = {name: shape for weight in weights(model) for name, shape in weight.whole.items()}
    with TensorFileWriter(destination / file_name(WEIGHTS, 0, 1), shapes) as writer:
        for name, shape in shapes.items():
            writer.append(name, _padded(tensors.read(name).float(), shape))


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape == shape:
        return tensor
    whole = tensor.new_zeros(shape)
    whole[: len(tensor)] = tensor
    return whole
