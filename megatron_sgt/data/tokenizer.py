"""One interface to sentencepiece models and to Hugging Face tokenizers on the local disk."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.errors import DataError, first_line

EOD_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
"""Possible end-of-text tokens of a bare ``tokenizer.json``, which does not name its own."""

HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Tokenizer(ABC):
    """Text to token ids and back. No special token is added to a text; ``eod`` separates documents."""

    def __init__(self, name: str, vocab_size: int, eod: int | None) -> None:
        self.name = name
        self.vocab_size = vocab_size
        """The largest id plus 1: the rows that an embedding needs."""
        self._eod = eod

    @property
    def eod(self) -> int:
        """Id of the token that ends a document.

        Raises:
            DataError: the tokenizer has none.
        """
        if self._eod is None:
            raise DataError(
                f"tokenizer {self.name} has no end-of-text token (an eos id, or one of "
                f"{', '.join(EOD_CANDIDATES)}); train one with tools/train_tokenizer.py, or add the token to "
                "its tokenizer_config.json"
            )
        return self._eod

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary spells ``token``: " the" as "▁the" or "Ġthe", a byte as "<0xE4>" or "ä"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what defines the tokenizer; independent of where the files are."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model`` file."""

    def __init__(self, path: str) -> None:
        import sentencepiece

        file = Path(path)
        if not file.is_file():
            raise DataError(f"tokenizer model {path} does not exist; tools/train_tokenizer.py makes one")
        try:
            self._bytes = file.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer model {path} cannot be read: {error.strerror}") from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._bytes)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path} is not a sentencepiece model ({len(self._bytes)} bytes); "
                "give the .model file, or set data.tokenizer.type to huggingface"
            ) from error
        eos = self._processor.eos_id()
        super().__init__(f"sentencepiece {path}", self._processor.get_piece_size(), eos if eos >= 0 else None)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._bytes).hexdigest()


class TokenizersJson(Tokenizer):
    """A bare ``tokenizer.json`` of the Hugging Face tokenizers library."""

    def __init__(self, path: str) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises the bare Exception
            raise DataError(
                f"{path} is not a tokenizer.json: {first_line(error)}; give one that Hugging Face's tokenizers have "
                "written, or set data.tokenizer.type to sentencepiece"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._path = Path(path)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        eod = next((vocab[token] for token in EOD_CANDIDATES if token in vocab), None)
        super().__init__(f"huggingface {path}", _size(vocab, path), eod)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def fingerprint(self) -> str:
        return hashlib.sha256(self._path.read_bytes()).hexdigest()


class AutoTokenizerFolder(Tokenizer):
    """A folder written by ``save_pretrained``, or a model name that is in the local Hugging Face cache."""

    def __init__(self, path: str) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # the variable has no effect once the library is imported
        try:
            # The model beside it may bring its own code, which a tokenizer does not need.
            tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # OSError, ValueError, KeyError, or whatever a damaged file provokes
            raise DataError(
                f"no Hugging Face tokenizer could be read from {path}: {first_line(error)}; nothing is downloaded: "
                "give a local folder with a tokenizer.json, or the name of a model in the local cache"
            ) from error
        tokenizer.model_max_length = 10**12  # documents are longer than the context of the model it came from
        self._tokenizer = tokenizer
        self._folder = Path(path)
        self._vocab = tokenizer.get_vocab()
        eod = tokenizer.eos_token_id
        if eod is None:
            eod = next((self._vocab[token] for token in EOD_CANDIDATES if token in self._vocab), None)
        super().__init__(f"huggingface {path}", _size(self._vocab, path), eod)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token) or ""

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in HF_FILES:
            file = self._folder / name
            if file.is_file():
                digest.update(name.encode() + b"\0" + file.read_bytes())
        digest.update(json.dumps(sorted(self._vocab.items()), ensure_ascii=True).encode())
        return digest.hexdigest()


def _size(vocab: dict[str, int], path: str) -> int:
    """The largest id plus 1."""
    if not vocab:
        raise DataError(f"the tokenizer in {path} has an empty vocabulary: damaged; copy it again")
    return max(vocab.values()) + 1


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that the configuration names.

    ``huggingface`` takes a folder (AutoTokenizer), a ``tokenizer.json`` or a folder that holds nothing else.

    Raises:
        DataError: the files are missing or damaged.
    """
    if config.type == "sentencepiece":
        return SentencePieceTokenizer(config.model)
    path = Path(config.model)
    if path.is_file():
        return TokenizersJson(str(path))
    if path.is_dir() and (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        return TokenizersJson(str(path / "tokenizer.json"))
    if path.is_absolute() and not path.exists():
        raise DataError(f"tokenizer {config.model} does not exist; give a local folder or a tokenizer.json")
    return AutoTokenizerFolder(config.model)


def tokenizer_of(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run's section data, None without one.

    Raises:
        DataError: as ``build_tokenizer``.
    """
    return None if data.tokenizer is None else build_tokenizer(data.tokenizer)


def resolve_vocab_size(model_vocab_size: int | None, tokenizer: Tokenizer | None) -> int:
    """Number of token ids that the model must know, before padding: ``model.vocab_size``, or the tokenizer's.

    Raises:
        DataError: neither is given, or the tokenizer has ids that the model would not know.
    """
    if tokenizer is None:
        if model_vocab_size is None:
            raise DataError("data.tokenizer is null, so model.vocab_size must be set")
        return model_vocab_size
    if model_vocab_size is not None and model_vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size {model_vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"tokenizer {tokenizer.name}; set model.vocab_size to null or to at least {tokenizer.vocab_size}"
        )
    return model_vocab_size or tokenizer.vocab_size
