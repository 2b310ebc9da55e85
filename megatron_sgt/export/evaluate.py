"""Measures an opened model on an indexed data set; by default on the samples that its run validates on."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.data.indexed import read_metadata
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.errors import ConfigError
from megatron_sgt.evaluation.dataset_loss import (
    ALL,
    DatasetLoss,
    Logits,
    WhichSamples,
    dataset_loss,
    open_samples,
)
from megatron_sgt.export.hf.open_model import OpenModel
from megatron_sgt.export.tokenizers import tokenizer_forms

VALID = "valid"


def which_samples(
    opened: OpenModel,
    data: tuple[str, ...],
    split: str | None,
    part: str | None,
    seq_length: int | None,
    num_samples: int | None,
) -> WhichSamples:
    """What to measure on; None and () leave the choice to the model.

    A checkpoint without ``data`` is measured as its run validates: on the same samples, with the same documents. Given
    data is used whole, unless ``part`` names a split of it, and every sequence is one document.

    Raises:
        ConfigError: a Hugging Face folder without ``data``.
    """
    length = seq_length or opened.context
    run = None if opened.source is None else opened.source.config
    if data:
        shares = split or (run.data.split if run is not None else DataConfig().split)
        return WhichSamples(DataConfig(data_path=data, split=shares), part or ALL, length, num_samples)
    if run is None or not run.data.data_path:
        raise ConfigError(f"{opened.name} names no data set to measure on; give --data PREFIX, or --tasks")
    as_validated = run.train.eval_iters * run.train.global_batch_size
    chosen = DataConfig(data_path=run.data.data_path, split=split or run.data.split, **_documents(run.data))
    whole = num_samples is not None or part not in (None, VALID)
    return WhichSamples(chosen, part or VALID, length, num_samples if whole else as_validated)


def which_of_set(opened: OpenModel, name: str, seq_length: int | None, num_samples: int | None) -> WhichSamples:
    """The samples of the set ``name`` of data.valid, by default those that the run reads in each validation.

    Raises:
        ConfigError: a Hugging Face folder; a run without such a set.
    """
    run = None if opened.source is None else opened.source.config
    known = {} if run is None else run.data.valid
    if run is None or name not in known:
        has = ", ".join(known) or "none"
        raise ConfigError(f"{opened.name} has no validation set {name!r} (data.valid: {has}); give --data PREFIX")
    as_validated = run.train.eval_iters * run.train.global_batch_size
    data = DataConfig(valid={name: known[name]}, **_documents(run.data))
    return WhichSamples(data, name, seq_length or opened.context, num_samples or as_validated)


def evaluate(opened: OpenModel, wanted: WhichSamples, tokenizer: Path | None, batch_size: int) -> DatasetLoss:
    """Measure. ``tokenizer``: what the user gave instead of the model's own.

    Raises:
        DataError: see ``open_samples``; the data was made with another tokenizer than the model's.
    """
    text = _tokenizer_for(opened, wanted, tokenizer)
    run = None if opened.source is None else opened.source.config
    own = run is not None and run.data.data_path == wanted.data.data_path and run.data_cache_dir.is_dir()
    # A run's sample indices exist already; others last as long as this process.
    place = nullcontext(str(run.data_cache_dir)) if run is not None and own else tempfile.TemporaryDirectory()
    with place as cache:
        samples, count = open_samples(wanted, opened.vocab_size, text, cache)
        return dataset_loss(
            logits_of(opened.model, wanted.data.reset_attention_mask),
            samples,
            count,
            opened.vocab_size,
            batch_size,
            opened.model.device,
            text,
        )


def _documents(data: DataConfig) -> dict[str, Any]:
    """What a run makes of the documents in its samples."""
    names = ("packing", "reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    return {name: getattr(data, name) for name in names}


def logits_of(model: Any, masked: bool) -> Logits:
    """Of a model of transformers. ``masked``: no token of a document attends to another one."""

    def logits(tokens: Tensor, starts: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        told = {}
        if starts is not None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            hidden = place > place[:, None]
            if masked:
                hidden = hidden | (place < starts[:, :, None])
            zeros = torch.zeros(len(tokens), 1, *hidden.shape[-2:], dtype=model.dtype, device=tokens.device)
            mask = zeros.masked_fill(hidden.view(-1, 1, *hidden.shape[-2:]), torch.finfo(model.dtype).min)
            told = {"attention_mask": mask, "position_ids": positions}
        return model(tokens, use_cache=False, **told).logits

    return logits


def _tokenizer_for(opened: OpenModel, wanted: WhichSamples, chosen: Path | None) -> Tokenizer | None:
    """The model's tokenizer, which must be the one that the data was made with; None without one.

    A folder may hold it in two forms, a sentencepiece model and its fast twin: the data knows only one of them.
    """
    found = [build_tokenizer(config) for config in _candidates(opened, chosen)]
    if not found:
        return None
    paths = [path for _, path in wanted.data.blend()] if wanted.data.data_path else wanted.data.valid.values()
    made_with = {read_metadata(resolve_prefix(path)[0]).get("tokenizer_fingerprint") for path in paths}
    return next((tokenizer for tokenizer in found if tokenizer.fingerprint() in made_with), found[0])


def _candidates(opened: OpenModel, chosen: Path | None) -> list[TokenizerConfig]:
    if chosen is not None and chosen.is_file():
        return [TokenizerConfig.at(chosen)]
    if chosen is None and opened.source is not None:
        own = opened.source.config.data.tokenizer
        return [] if own is None else [own]
    return tokenizer_forms(Path(opened.name) if chosen is None else chosen)
