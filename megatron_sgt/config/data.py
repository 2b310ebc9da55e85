"""Where the text comes from and how it becomes tokens."""

import re
from collections.abc import Iterator
from os import PathLike
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from megatron_sgt.config.base import Choice, PathText, Section, shown
from megatron_sgt.config.lengths import LengthEntry


class TokenizerConfig(Section):
    """The tokenizer that made the data set."""

    type: Literal["sentencepiece", "huggingface"] = Field(description="Library that reads the tokenizer.")
    model: PathText = Field(
        description="sentencepiece: the .model file; huggingface: a folder, or the name of a cached model.",
    )
    add_bos: bool = Field(
        default=False,
        description="Documents of the data set begin with the beginning-of-text token: it was made with --add-bos. So "
        "does every prompt, in this project and in the exported model.",
    )

    @classmethod
    def at(cls, path: str | PathLike[str], add_bos: bool = False) -> "TokenizerConfig":
        """Return the section that reads the file or folder ``path``: sentencepiece if it ends in .model."""
        kind: Any = "sentencepiece" if str(path).endswith(".model") else "huggingface"
        return cls(type=kind, model=str(path), add_bos=add_bos)


class DataConfig(Section):
    """Megatron indexed data sets, their blend and their split."""

    dataset: Annotated[str, Choice("datasets", ("indexed",))] = Field(
        default="indexed",
        description="Where the samples come from; indexed: the .bin/.idx pairs of data_path. Another one makes of the "
        "settings of this section what it likes.",
    )
    data_path: tuple[PathText, ...] = Field(
        default=(),
        description="Prefix of a .bin/.idx pair, or a blend [weight, prefix, weight, prefix, ...], also as one text: "
        "'0.3 a 0.7 b'.",
    )
    split: str = Field(
        default="949,50,1",
        description="Shares of the documents for training, validation and test, in any unit.",
    )
    valid: dict[str, PathText] = Field(
        default_factory=dict,
        description="Further validation sets by name, {wiki: PREFIX, code: PREFIX}: each is read whole and measured "
        "beside the validation split, with the first train.eval_iters global batches or all of it if that is less.",
    )
    data_cache_path: PathText | None = Field(
        default=None, description="Folder of the sample indices; null: data_cache in logging.run_dir."
    )
    tokenizer: TokenizerConfig | None = Field(
        default=None, description="null: the data is already tokens, and model.vocab_size must be set."
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="How documents fill samples. concat: one after the other, cut wherever a sample ends. best_fit: "
        "whole documents where they fit best, cut only if longer than model.seq_length; what is left is padding, whose "
        "loss does not count. Needs reset_attention_mask.",
    )
    reset_attention_mask: bool = Field(
        default=False,
        description="No token attends to another document of its sequence. Where documents begin is known from the "
        "data set's index, whatever the tokens are.",
    )
    reset_position_ids: bool = Field(default=False, description="Positions begin at 0 with each document.")
    eod_mask_loss: bool = Field(
        default=False,
        description="What the last token of a document predicts, the first token of the next document, counts for "
        "nothing in the loss.",
    )
    allow_validation_leak: bool = Field(
        default=False,
        description="Go on from a checkpoint although documents that it held out for validation or test are trained on "
        "now, or the reverse: after another split, or with other files. And start although a set of data.valid is "
        "trained on.",
    )
    allow_changed_data: bool = Field(
        default=False,
        description="Go on from a checkpoint although a data set of its blend holds other documents than it did under "
        "the same name (not the same ones with some appended): it counts as one that was never read, from its first "
        "epoch on.",
    )
    num_workers: int = Field(
        default=0, ge=0, le=1024, description="Processes that read samples ahead, per rank; 0: none."
    )
    seq_length_curriculum: tuple[LengthEntry, ...] = Field(
        default=(),
        description="Shorter training sequences at first: samples of model.seq_length tokens are cut into pieces "
        "(growing.md). Each entry ends where its steps or tokens end; after the last one the length is "
        "model.seq_length. Empty: it always is.",
    )

    @property
    def tells_documents(self) -> bool:
        """Whether samples say which of their tokens belong together: ``document_starts`` and ``num_tokens``."""
        return self.reset_attention_mask or self.reset_position_ids

    @property
    def masks_loss(self) -> bool:
        """Whether the loss may count more tokens of one micro-batch than of another."""
        return self.eod_mask_loss or self.packing == "best_fit"

    @field_validator("data_path", mode="before")
    @classmethod
    def _as_strings(cls, value: Any) -> Any:
        return blend_texts(value)

    def problems(self) -> Iterator[str]:
        if len(self.data_path) > 1 and (len(self.data_path) % 2 or not all(map(_is_weight, self.data_path[::2]))):
            hint = "" if any(map(_is_weight, self.data_path)) else f"; alike: [1, {', 1, '.join(self.data_path)}]"
            yield (
                f"data_path: {list(self.data_path)} is neither one prefix nor a blend "
                f"[weight, prefix, weight, prefix, ...] with weights above 0{hint}"
            )
        elif self.data_path and not all(share > 0 for share, _ in self.blend()):
            yield f"data_path: the weights {list(self.data_path[::2])} are too far apart: one's share would be 0"
        if self.packing == "best_fit" and not self.reset_attention_mask:
            yield (
                "packing: best_fit puts documents side by side for their lengths alone; set data.reset_attention_mask: "
                "true, so that none attends to another"
            )
        try:
            self.split_shares()
        except ValueError:
            yield f"split: '{self.split}' is not one to three shares such as '949,50,1', the first above 0"
        for name in self.valid:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                yield f"valid: {shown(name)} is no plain name; use letters, digits and _, and begin with no digit"
        if self.valid and self.dataset != "indexed":
            yield f"valid: these are indexed data sets, but dataset is '{self.dataset}'; leave them out"

    def blend(self) -> tuple[tuple[float, str], ...]:
        """Return (weight, prefix) pairs, the weights summing to 1; empty if there is no data."""
        if len(self.data_path) == 1:
            return ((1.0, self.data_path[0]),)
        weights = [float(weight) for weight in self.data_path[::2]]
        total = sum(weights)
        return tuple((weight / total, prefix) for weight, prefix in zip(weights, self.data_path[1::2], strict=True))

    def split_shares(self) -> tuple[float, float, float]:
        shares = [float(share) for share in self.split.split(",")]
        total = sum(shares)
        if len(shares) > 3 or not 0 < total < float("inf") or shares[0] <= 0 or min(shares) < 0:
            raise ValueError(self.split)
        train, valid, test = [share / total for share in shares] + [0.0] * (3 - len(shares))
        return train, valid, test


def blend_texts(value: Any) -> Any:
    """A blend in any of its notations as the texts of ``data_path``.

    Raises:
        ValueError: it is a mapping.
    """
    if isinstance(value, str):
        return tuple(_words(value))
    if isinstance(value, (list, tuple)):
        parts = [part for item in value for part in (item if isinstance(item, (list, tuple)) else (item,))]
        return tuple(text for part in parts for text in (_words(part) if isinstance(part, str) else (_text(part),)))
    if isinstance(value, dict):
        raise ValueError(f"{shown(value)} is a mapping; write a blend as [weight, prefix, weight, prefix, ...]")
    return value


def _words(text: str) -> list[str]:
    """``text``, or its words where it is a blend in Megatron's form: "0.3 a 0.7 b", also with commas or percent."""
    found = re.split(r"[\s,]+", text.strip(" \t,"))
    if len(found) % 2 or not all(_is_weight(_fraction(weight)) for weight in found[::2]):
        return [_fraction(text)]
    return [_fraction(word) if index % 2 == 0 else word for index, word in enumerate(found)]


def _fraction(text: str) -> str:
    """A percentage as a number; any other text as it is."""
    number = text.strip().removesuffix("%")
    return repr(float(number) / 100) if number != text.strip() and _is_weight(number) else text


def _text(item: Any) -> Any:
    is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
    return repr(item) if is_number else item


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
