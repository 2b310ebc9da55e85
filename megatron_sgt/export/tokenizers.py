"""Finds, compares and copies the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_sgt.config import Config
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import AutoTokenizerFolder, Tokenizer, TokenizersJson, build_tokenizer, read_origin
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.tokenizer import COPIED

TOKENIZER_FOLDER = "tokenizer"
"""Where an imported model's tokenizer lies, beside its checkpoint."""

SENTENCEPIECE_FILE = "tokenizer.model"


def tokenizer_forms(folder: Path) -> list[TokenizerConfig]:
    """The sections data.tokenizer that read the tokenizer of ``folder``: its fast form, its sentencepiece model."""
    forms, add_bos = [], bool((read_origin(folder) or {}).get("add_bos"))
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        forms.append(TokenizerConfig(type="huggingface", model=str(folder), add_bos=add_bos))
    if (folder / SENTENCEPIECE_FILE).is_file():
        path = str(folder / SENTENCEPIECE_FILE)
        forms.append(TokenizerConfig(type="sentencepiece", model=path, add_bos=add_bos))
    return forms


def begins_texts(folder: Path) -> str | None:
    """The token that the tokenizer of ``folder`` begins every text with by itself; None where it does not.

    Raises:
        DataError: it cannot be read.
    """
    for form in tokenizer_forms(folder):
        if form.type == "huggingface":
            found = build_tokenizer(form)
            fast = found.fast if isinstance(found, TokenizersJson | AutoTokenizerFolder) else None
            if fast is not None and found.beginning is not None and fast.encode("a").ids[:1] == [found.beginning]:
                return fast.id_to_token(found.beginning)
    return None


def tokenizer_in(folder: Path) -> TokenizerConfig | None:
    """The tokenizer of ``folder``; None without one.

    Of two forms the sentencepiece model is used if both tokenize alike, as in folders exported by this project, whose
    data sets refer to that model. Where they differ, transformers would use the fast form.

    Raises:
        DataError: a form cannot be read.
    """
    forms = tokenizer_forms(folder)
    if len(forms) > 1:
        fast, pieces = map(build_tokenizer, forms)
        return forms[0] if first_difference(fast, pieces) is not None else forms[1]
    return forms[0] if forms else None


def tokenizer_at(folder: Path, found: TokenizerConfig) -> TokenizerConfig:
    """``found`` after ``copy_tokenizer`` into ``folder``."""
    path = folder / SENTENCEPIECE_FILE if found.type == "sentencepiece" else folder
    return TokenizerConfig(type=found.type, model=str(path), add_bos=found.add_bos)


def copy_tokenizer(source: Path, folder: Path, found: TokenizerConfig) -> None:
    """Copy the files of the tokenizer ``found`` in ``source``.

    Raises:
        OSError: they cannot be written.
        DataError: the copy tokenizes differently: transformers may choose a tokenizer's class by the config.json beside
            it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    check_same(build_tokenizer(found), build_tokenizer(tokenizer_at(folder, found)))


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model of ``vocab_size`` ids knows every id of ``tokenizer``.

    Raises:
        DataError: it does not.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model knows {vocab_size}: it belongs to "
            "another model"
        )


def first_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """The first of HARD_TEXTS that the two tokenize differently; None if there is none."""
    return next((text for text in HARD_TEXTS if one.encode(text) != other.encode(text)), None)


def check_same(one: Tokenizer, other: Tokenizer) -> None:
    """Compare two tokenizers on sample texts.

    Raises:
        DataError: they tokenize one differently.
    """
    if (text := first_difference(one, other)) is not None:
        raise DataError(
            f"tokenizer {other.name} cuts text ({text[:30]!r}) into other ids than {one.name}, which came with the "
            "model; use the latter"
        )


def check_tokenizers(source: Path, found: TokenizerConfig | None, run: Config | None, vocab_size: int) -> str | None:
    """Compare the imported tokenizer with that of ``run``; returns the fingerprint of the one to train with, or None.

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
    used = chosen or theirs
    return None if used is None else used.fingerprint()
