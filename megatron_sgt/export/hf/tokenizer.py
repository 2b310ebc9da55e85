"""The tokenizer of an exported folder, as training had it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_sgt.config import Config
from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.data.indexed import read_metadata
from megatron_sgt.data.tokenizer import (
    HF_FILES,
    ORIGIN_FILE,
    AutoTokenizerFolder,
    Tokenizer,
    TokenizersJson,
    resolve_vocab_size,
    tokenizer_of,
    write_origin,
)
from megatron_sgt.errors import DataError
from megatron_sgt.export.architecture import TokenIds, WrittenTokenizer
from megatron_sgt.export.hf.sentencepiece_files import write_sentencepiece
from megatron_sgt.export.hf.tokenizer_files import (
    NONE,
    Settings,
    chat_template_of,
    cuts_as_qwen,
    notes_of,
    of_loaded,
    write_files,
    write_slow,
)

COPIED = (*HF_FILES, ORIGIN_FILE, "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


def write_tokenizer(
    wanted: TokenizerConfig, folder: Path, config: Config, chat_template: str = NONE
) -> WrittenTokenizer:
    """Write the tokenizer's files into ``folder``.

    Args:
        config: of the run, whose model must know all ids, and whose data says how documents begin.
        chat_template: see ``chat_template_of``.

    Raises:
        DataError: it cannot be read, is not the one that the run's data was made with, or cannot be expressed as
            a tokenizer of transformers that gives the ids of training.
    """
    add_bos = begins_with_bos(config)
    tokenizer = tokenizer_of(DataConfig(tokenizer=wanted.model_copy(update={"add_bos": add_bos})))
    assert tokenizer is not None
    resolve_vocab_size(config.model.vocab_size, tokenizer)
    of_data = _check_data(tokenizer, config)
    bos = tokenizer.bos if add_bos else None
    if isinstance(tokenizer, TokenizersJson | AutoTokenizerFolder):
        written = _write_hugging_face(tokenizer, folder, config.model.seq_length, bos, chat_template)
    else:
        beginning = None if bos is None else (tokenizer.piece(bos), bos)
        settings = Settings(config.model.seq_length, beginning, chat_template=chat_template_of(chat_template, None))
        written = write_sentencepiece(Path(wanted.model), tokenizer, settings, folder)
    write_origin(folder, tokenizer.fingerprint(), add_bos)
    qwen = isinstance(tokenizer, TokenizersJson | AutoTokenizerFolder) and cuts_as_qwen(tokenizer.fast)
    notes = (*written.notes, *of_data)
    return replace(written, ids=replace(written.ids, begin=bos), notes=notes, like_qwen=qwen)


def begins_with_bos(config: Config) -> bool:
    """Whether the documents that a run trains on begin with the beginning-of-text token."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer.add_bos
    return any(read_metadata(prefix).get("add_bos") for prefix in config.data_prefixes)


def _check_data(tokenizer: Tokenizer, config: Config) -> tuple[str, ...]:
    """What to say of the data sets that can be read; DataError where one was made with another tokenizer."""
    notes = []
    for prefix in config.data_prefixes:
        metadata = read_metadata(prefix)
        made_with = metadata.get("tokenizer_fingerprint")
        if made_with not in (None, tokenizer.fingerprint()):
            raise DataError(
                f"tokenizer {tokenizer.name} (sha256 {tokenizer.fingerprint()[:12]}…) is not the one that {prefix} "
                f"was made with (sha256 {made_with[:12]}…); give --tokenizer"
            )
        if metadata.get("tokenizer_ids") not in (None, tokenizer.digest_of_ids()):
            notes.append(
                f"The data set {Path(prefix).name} was made with other ids from the same tokenizer files, by another "
                "version of transformers or tokenizers: export with that version, or texts are cut otherwise than in "
                "training."
            )
    return tuple(notes)


def _write_hugging_face(
    tokenizer: TokenizersJson | AutoTokenizerFolder, folder: Path, max_length: int, bos: int | None, wanted: str
) -> WrittenTokenizer:
    """``bos``: begins every text; ``wanted``: see ``chat_template_of``."""
    loaded = tokenizer.loaded if isinstance(tokenizer, AutoTokenizerFolder) else None
    settings = Settings(max_length, None if bos is None else (tokenizer.piece(bos), bos))
    settings = replace(settings, chat_template=chat_template_of(wanted, loaded))
    ids = TokenIds(bos, tokenizer.end, tokenizer.end)
    if loaded is None:
        end = {} if tokenizer.end is None else dict.fromkeys(("eos_token", "pad_token"), tokenizer.piece(tokenizer.end))
        settings = replace(settings, special=end)
    else:
        settings = of_loaded(settings, loaded)
        if tokenizer.end is not None:  # a batch needs a padding token, as generation_config.json has one
            settings = replace(settings, special={"pad_token": tokenizer.piece(tokenizer.end), **settings.special})
        if loaded.bos_token_id is not None:
            ids = replace(ids, bos=loaded.bos_token_id)
        if loaded.pad_token_id is not None:
            ids = replace(ids, pad=loaded.pad_token_id)
    if tokenizer.fast is None:
        write_slow(loaded, settings, folder, tokenizer)
    else:
        write_files(tokenizer.fast, settings, folder)
    adds = tokenizer.fast is not None and tokenizer.fast.num_special_tokens_to_add(False) > 0
    return WrittenTokenizer(ids, notes_of(settings, adds, bool(getattr(loaded, "chat_template", None))))
