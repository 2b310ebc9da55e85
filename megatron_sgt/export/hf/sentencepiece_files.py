"""The tokenizer of an exported folder whose training used a sentencepiece model: a fast one, or a slow class."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.sentencepiece_model import CONTROL, USER_DEFINED, Pieces, form_of, read_pieces, slow_or_none
from megatron_sgt.data.tokenizer import Tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.architecture import TokenIds, WrittenTokenizer
from megatron_sgt.export.hf.sentencepiece_fast import fast_tokenizer
from megatron_sgt.export.hf.tokenizer_files import Sameness, Settings, notes_of, write_files, write_slow_class

SLOW_CLASS = "BertGenerationTokenizer"
"""A class of transformers 4 and 5 that hands a text to sentencepiece, and adds and changes nothing.

Decoding it strips the text, and transformers 5 leaves bytes as the names of their pieces.
"""
_ITS_FILE = "spiece.model"
_MANY = 50


def write_sentencepiece(path: Path, tokenizer: Tokenizer, settings: Settings, folder: Path) -> WrittenTokenizer:
    """Write the model file at ``path``, which training had as ``tokenizer``, into ``folder`` for transformers.

    Args:
        settings: without its special tokens, which are the model's.

    Raises:
        DataError: no tokenizer of transformers gives its ids.
        OSError: the files cannot be written.
    """
    pieces = read_pieces(path)
    named = {
        "bos_token": pieces.special(pieces.bos),
        "eos_token": pieces.special(pieces.eos),
        "unk_token": pieces.special(pieces.unk),
        "pad_token": pieces.special(pieces.pad_or_stand_in),
    }
    settings = replace(settings, special={name: token for name, token in named.items() if token is not None})
    form = form_of(pieces, settings.bos is not None)
    notes = notes_of(settings)
    shutil.copyfile(path, folder / "tokenizer.model")
    if form.form == "fast":
        try:
            write_files(_checked(path, pieces, tokenizer), settings, folder)
        except DataError as error:
            form = slow_or_none(pieces, str(error), settings.bos is not None)
    if form.form == "none":
        raise DataError(f"{path} cannot be exported: {form.line}")
    if form.form == "slow":
        shutil.copyfile(path, folder / _ITS_FILE)
        write_slow_class(SLOW_CLASS, settings, folder, tokenizer)
        notes = (*notes, _slow_note(form.why))
    return WrittenTokenizer(TokenIds(pieces.bos, pieces.eos, pieces.pad_or_stand_in), notes)


def sameness(path: Path, exported: object) -> Sameness:
    """When ``exported``, of transformers, counts as the model at ``path``."""
    if type(exported).__name__ == SLOW_CLASS:
        return Sameness(text=False)
    return Sameness(read_pieces(path).same_segmentation)


def _slow_note(why: str) -> str:
    return (
        f"It is a slow tokenizer, sentencepiece itself (`pip install sentencepiece`), because {why}. Its ids are those "
        "of training; `tokenizer.decode(ids)` strips spaces at both ends and, in transformers 5, shows bytes by their "
        "names: `tokenizer.sp_model.decode(ids)` gives the text as training's tokenizer does."
    )


def _checked(path: Path, pieces: Pieces, tokenizer: Tokenizer) -> FastTokenizer:
    fast = fast_tokenizer(path, pieces)
    # A special token written out in a text is text, as it was in training.
    fast.encode_special_tokens = True
    signs = pieces.texts(USER_DEFINED, CONTROL)[:_MANY]
    for text in (*HARD_TEXTS, "".join(signs), *(f" {sign}a {sign} {sign}{sign}" for sign in signs)):
        ids = tokenizer.encode(text)
        same = pieces.same_segmentation(fast.encode(text, add_special_tokens=False).ids, ids)
        if not same or fast.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            raise DataError(f"a fast tokenizer of it treats {text[:40]!r} differently")
    return fast
