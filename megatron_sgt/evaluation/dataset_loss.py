"""Loss, perplexity and bits per byte of a model on an indexed data set, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.data import DataConfig
from megatron_sgt.data.gpt_dataset import BlendedSamples, build_datasets, open_validation_sets
from megatron_sgt.data.splits import SPLIT_NAMES
from megatron_sgt.data.tokenizer import Tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.evaluation.perplexity import bits_per_byte, perplexity
from megatron_sgt.evaluation.text_bytes import TextBytes

Logits = Callable[..., Tensor]
"""tokens [B, S] -> logits [B, S, rows]; where samples tell their documents, also their starts and positions [B, S]."""
ALL = "all"


@dataclass(frozen=True)
class DatasetLoss:
    """Mean cross-entropy over all tokens of ``samples`` sequences.

    loss: nats per token over the ``vocab_size`` ids that a text can contain. padded_loss: the same over all rows of the
    vocabulary, as training measures it; None where there are no padding rows. text_bytes: UTF-8 bytes of the
    predicted tokens (text_bytes.py), None without a tokenizer. The ends of documents are predicted too: they count in
    the loss, and have no bytes.
    """

    samples: int
    tokens: int
    loss: float
    padded_loss: float | None
    text_bytes: int | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """loss in bits, per byte of text instead of per token: comparable between tokenizers."""
        return bits_per_byte(self.loss, self.tokens, self.text_bytes)


@dataclass(frozen=True)
class WhichSamples:
    """data: as in a run's configuration; part: "train", "valid", "test", or "all" for the data set as one.

    Or a name in data.valid. num_samples: only the first ones, of a named set no more than it has; None: all, once.
    """

    data: DataConfig
    part: str
    seq_length: int
    num_samples: int | None = None


def open_samples(
    wanted: WhichSamples, vocab_size: int, tokenizer: Tokenizer | None, cache: str
) -> tuple[BlendedSamples, int]:
    """The chosen samples, as a run validates on them, and how many to read; ``cache``: folder for their indices.

    Raises:
        DataError: the data is missing or damaged, was made with another tokenizer, or has no such sample.
    """
    data = wanted.data.model_dump() | {"data_cache_path": cache}
    if wanted.part == ALL:
        data["split"] = "1"
    config = _config(data, wanted.seq_length, vocab_size)
    if wanted.part in config.data.valid:
        named = open_validation_sets(config, tokenizer)[wanted.part]
        return named, min(len(named), wanted.num_samples or len(named))
    parts = build_datasets(config, tokenizer)
    samples = parts[0] if wanted.part == ALL else parts[SPLIT_NAMES.index(wanted.part)]
    if samples is None:
        raise DataError(
            f"the {wanted.part} split (data.split {data['split']}) of {', '.join(data['data_path'])} holds no whole "
            f"sample of {wanted.seq_length} tokens"
        )
    return samples, len(samples) if wanted.num_samples is None else wanted.num_samples


def _config(data: dict[str, Any], seq_length: int, vocab_size: int) -> Config:
    return parse_config(
        {
            "model": {
                "num_layers": 1, "hidden_size": 2, "num_attention_heads": 1, "seq_length": seq_length,
                "vocab_size": vocab_size,
            },
            "growth": {"method": "vanilla"},
            "optim": {"lr": 1.0},
            "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "data": data,
        },
        source="the data to evaluate on",
    )  # fmt: skip


@torch.no_grad()
def dataset_loss(
    logits: Logits,
    samples: BlendedSamples,
    num_samples: int,
    vocab_size: int,
    batch_size: int,
    device: torch.device,
    tokenizer: Tokenizer | None = None,
) -> DatasetLoss:
    """Measure ``num_samples`` samples, ``batch_size`` at a time.

    Args:
        vocab_size: ids that a text can have; further rows of the logits are padding.
        tokenizer: counts the bytes of the text; None: they are not counted.
    """
    total, padded, tokens, text_bytes = 0.0, 0.0, 0, 0
    counter = None if tokenizer is None else TextBytes(tokenizer)
    has_padding = False
    for first in range(0, num_samples, batch_size):
        batch = [samples[i] for i in range(first, min(first + batch_size, num_samples))]
        labels = torch.stack([sample["labels"] for sample in batch])
        mask = torch.stack([sample["loss_mask"] for sample in batch])
        told = ["document_starts", "position_ids"] if "document_starts" in batch[0] else []
        given = (torch.stack([sample[name] for sample in batch]).to(device) for name in ("tokens", *told))
        found = logits(*given).float()
        has_padding = found.shape[-1] > vocab_size
        total += _summed_loss(found[..., :vocab_size], labels, mask)
        padded += _summed_loss(found, labels, mask) if has_padding else 0.0
        tokens += int(mask.sum())
        if counter is not None:
            text_bytes += counter.count_labels(torch.stack([sample["tokens"] for sample in batch]), labels, mask)
    return DatasetLoss(
        samples=num_samples,
        tokens=tokens,
        loss=total / tokens,
        padded_loss=padded / tokens if has_padding else None,
        text_bytes=None if tokenizer is None else text_bytes,
    )


def _summed_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> float:
    """Sum over the positions of mask 1; logits [B, S, V] fp32, summed up in fp64."""
    labels, mask = labels.to(logits.device), mask.to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return float((losses.double() * mask.flatten()).sum())
