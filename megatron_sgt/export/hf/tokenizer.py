"""The tokenizer of an exported folder: a sentencepiece model as a fast tokenizer, a Hugging Face one copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.indexed import read_metadata
from megatron_sgt.data.tokenizer import HF_FILES, Tokenizer, build_tokenizer, resolve_vocab_size
from megatron_sgt.errors import DataError
from megatron_sgt.export.architecture import TokenIds, WrittenTokenizer
from megatron_sgt.export.hf.sentencepiece_fast import fast_tokenizer, read_pieces
from megatron_sgt.files import write_json

COPIED = (*HF_FILES, "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


def write_tokenizer(wanted: TokenizerConfig, folder: Path, config: Config) -> WrittenTokenizer:
    """Write the tokenizer's files into ``folder``; ``config``: of the run, whose model must know all ids.

    Raises:
        DataError: it cannot be read, is not the one that the run's data was made with, or cannot be expressed as
            a fast tokenizer.
    """
    tokenizer = build_tokenizer(wanted)
    resolve_vocab_size(config.model.vocab_size, tokenizer)
    _check_data(tokenizer, config)
    if wanted.type == "sentencepiece":
        return _write_sentencepiece(Path(wanted.model), tokenizer, folder, config.model.seq_length)
    return _copy_hugging_face(Path(wanted.model), tokenizer, folder)


def _check_data(tokenizer: Tokenizer, config: Config) -> None:
    """Refuse, with DataError, a run whose data set can be read and was made with another tokenizer."""
    for _, prefix in config.data.blend() if config.data.data_path else ():
        made_with = read_metadata(prefix).get("tokenizer_fingerprint")
        if made_with not in (None, tokenizer.fingerprint()):
            raise DataError(
                f"tokenizer {tokenizer.name} (sha256 {tokenizer.fingerprint()[:12]}…) is not the one that {prefix} "
                f"was made with (sha256 {made_with[:12]}…); give --tokenizer"
            )


def _write_sentencepiece(model: Path, tokenizer: Tokenizer, folder: Path, max_length: int) -> WrittenTokenizer:
    pieces = read_pieces(model)
    fast = fast_tokenizer(pieces)
    # A special token written out in a text is text, as it was in training.
    fast.encode_special_tokens = True
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        same = pieces.same_segmentation(fast.encode(text, add_special_tokens=False).ids, ids)
        if pieces.unk not in ids:  # for which sentencepiece writes a sign of its own
            same = same and fast.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
        if not same:
            raise DataError(
                f"{model} cannot be expressed as a fast tokenizer: it treats {text!r} differently; give "
                "--tokenizer none and put a tokenizer into the folder yourself"
            )
    fast.save(str(folder / "tokenizer.json"))
    shutil.copyfile(model, folder / "tokenizer.model")
    names = {
        "bos_token": pieces.special(pieces.bos),
        "eos_token": pieces.special(pieces.eos),
        "unk_token": pieces.special(pieces.unk),
        "pad_token": pieces.special(pieces.pad_or_stand_in),
    }
    special = {name: token for name, token in names.items() if token is not None}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one name that transformers 4 and 5 both know
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    return WrittenTokenizer(TokenIds(pieces.bos, pieces.eos, pieces.pad_or_stand_in))


def _copy_hugging_face(source: Path, tokenizer: Tokenizer, folder: Path) -> WrittenTokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        eos: int | None = tokenizer.eod
    except DataError:
        eos = None
    if source.is_dir() and (source / "tokenizer_config.json").is_file():
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif source.exists():
        file = source if source.is_file() else source / "tokenizer.json"
        bare = PreTrainedTokenizerFast(tokenizer_file=str(file))
        end = None if eos is None else bare.convert_ids_to_tokens(eos)
        shutil.copyfile(file, folder / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        named = {} if end is None else {"eos_token": end, "pad_token": end}
        write_json(folder / "tokenizer_config.json", settings | named)
    else:
        AutoTokenizer.from_pretrained(str(source), **offline).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder, **offline)
    pad = loaded.pad_token_id if loaded.pad_token_id is not None else eos
    return WrittenTokenizer(TokenIds(loaded.bos_token_id, eos, pad))
