"""The tokenizer that comes with a Hugging Face folder: found, compared, copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_sgt.config import Config
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.errors import DataError

TOKENIZER_FOLDER = "tokenizer"
"""Where an imported model's tokenizer lies, beside its checkpoint."""

SENTENCEPIECE_FILE = "tokenizer.model"
_FILES = (
    "tokenizer.json", SENTENCEPIECE_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip

_PROBE = (
    "The quick brown fox jumps over 1,234 lazy dogs.\n\tfor (i = 0; i < n; ++i) { x[i] *= 2.5e-3; }\n"
    "Zwölf Boxkämpfer, cinquième élève, быстрая лиса, 素早い狐, 빠른 여우, 🦊.  Don't   stop-word's end"
)
"""What two tokenizers must cut alike to count as the same."""


def tokenizer_in(folder: Path) -> TokenizerConfig | None:
    """The section data.tokenizer that reads the tokenizer of ``folder``; None without one."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return TokenizerConfig(type="huggingface", model=str(folder))
    if (folder / SENTENCEPIECE_FILE).is_file():
        return TokenizerConfig(type="sentencepiece", model=str(folder / SENTENCEPIECE_FILE))
    return None


def tokenizer_at(folder: Path, found: TokenizerConfig) -> TokenizerConfig:
    """``found`` after ``copy_tokenizer`` into ``folder``."""
    path = folder / SENTENCEPIECE_FILE if found.type == "sentencepiece" else folder
    return TokenizerConfig(type=found.type, model=str(path))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError when ``tokenizer`` has ids that a model of ``vocab_size`` ids does not know."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model knows {vocab_size}: it belongs to "
            "another model"
        )


def check_same(one: Tokenizer, other: Tokenizer) -> None:
    """Raises DataError when the two cut the same text into different ids."""
    if one.encode(_PROBE) != other.encode(_PROBE):
        raise DataError(
            f"tokenizer {other.name} cuts text into other ids than {one.name}, which came with the model; use the "
            "latter"
        )


def check_tokenizers(
    source: Path, found: TokenizerConfig | None, run: Config | None, vocab_size: int
) -> None:
    """Check the tokenizer ``found`` in the imported folder and the one of the ``run`` that will go on with it.

    Raises:
        DataError: one of them cannot be read or has too many ids, or they differ.
    """
    theirs = None if found is None else build_tokenizer(found)
    chosen = None if run is None or run.data.tokenizer is None else build_tokenizer(run.data.tokenizer)
    for tokenizer in (theirs, chosen):
        if tokenizer is not None:
            check_fits(tokenizer, vocab_size)
    if theirs is not None and chosen is not None:
        check_same(theirs, chosen)
