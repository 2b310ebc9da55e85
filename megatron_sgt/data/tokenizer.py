"""One interface to sentencepiece models and to Hugging Face tokenizers on the local disk."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.special_tokens import read_as_text
from megatron_sgt.errors import DataError, first_line
from megatron_sgt.files import sha256_of, write_json

EOD_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
"""Possible end-of-text tokens of a bare ``tokenizer.json``, which does not name its own."""

BOS_CANDIDATES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|bos|>", "[BOS]")
"""Possible beginning-of-text tokens of such a file."""

ORIGIN_FILE = "tokenizer_origin.json"
"""In an exported folder: which tokenizer its data was made with, as the files of the folder are other ones."""

_ORIGINALS = ("tokenizer.json", "tokenizer.model", "vocab.json")

HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Tokenizer(ABC):
    """Text to token ids and back. No special token is added to a text, and none is read out of one.

    ``eod`` separates documents; ``bos`` begins them where data.tokenizer.add_bos says so.
    """

    def __init__(self, name: str, vocab_size: int, eod: int | None, bos: int | None) -> None:
        self.name = name
        self.vocab_size = vocab_size
        """The largest id plus 1: the rows that an embedding needs."""
        self.end, self.beginning = eod, bos
        """Ids of the tokens that end and begin a text; None where it has none."""

    @property
    def eod(self) -> int:
        """Id of the token that ends a document.

        Raises:
            DataError: the tokenizer has none.
        """
        if self.end is None:
            raise DataError(
                f"tokenizer {self.name} has no end-of-text token (an eos id, or one of "
                f"{', '.join(EOD_CANDIDATES)}); train one with tools/train_tokenizer.py, or add the token to "
                "its tokenizer_config.json"
            )
        return self.end

    @property
    def bos(self) -> int:
        """Id of the token that begins a text.

        Raises:
            DataError: the tokenizer has none.
        """
        if self.beginning is None:
            raise DataError(
                f"tokenizer {self.name} has no beginning-of-text token (a bos id, or one of "
                f"{', '.join(BOS_CANDIDATES)}): leave out --add-bos (data.tokenizer.add_bos), or add the token to its "
                "tokenizer_config.json"
            )
        return self.beginning

    @property
    def boundaries(self) -> frozenset[int]:
        """The ids that begin and end documents, as far as there are such: they are no text."""
        return frozenset(index for index in (self.beginning, self.end) if index is not None)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens; one that is written out in ``text`` is text."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary spells ``token``: " the" as "▁the" or "Ġthe", a byte as "<0xE4>" or "ä"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what defines the tokenizer; independent of where the files are."""

    def digest_of_ids(self) -> str:
        """SHA-256 (hex) of the ids of HARD_TEXTS: versions of a library may read the same files otherwise."""
        ids = [self.encode(text) for text in HARD_TEXTS]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


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
        eos, bos = (i if i >= 0 else None for i in (self._processor.eos_id(), self._processor.bos_id()))
        super().__init__(f"sentencepiece {path}", self._processor.get_piece_size(), eos, bos)

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
        eod, bos = (_first_of(names, vocab) for names in (EOD_CANDIDATES, BOS_CANDIDATES))
        super().__init__(f"huggingface {path}", _size(vocab, path), eod, bos)
        read_as_text(self._tokenizer, self.boundaries)

    @property
    def fast(self) -> Any:
        """The ``tokenizers.Tokenizer``."""
        return self._tokenizer

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
        self.loaded = tokenizer
        """As transformers has it."""
        self._folder = Path(path)
        self._vocab = tokenizer.get_vocab()
        eod, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        eod = _first_of(EOD_CANDIDATES, self._vocab) if eod is None else eod
        bos = _first_of(BOS_CANDIDATES, self._vocab) if bos is None else bos
        super().__init__(f"huggingface {path}", _size(self._vocab, path), eod, bos)
        if self.fast is not None:
            read_as_text(self.fast, self.boundaries)
        else:
            self._refuse_ordinary_added_tokens()

    def _refuse_ordinary_added_tokens(self) -> None:
        """A class in Python alone takes all added tokens in a text for text, or none."""
        special = {*self.loaded.all_special_tokens}
        added = self.loaded.added_tokens_decoder.values()
        if ordinary := [str(token) for token in added if not token.special and str(token) not in special]:
            raise DataError(
                f"tokenizer {self.name} is a {type(self.loaded).__name__}, which exists in Python alone and cannot "
                f"tell its added token {ordinary[0]!r} from special tokens written out in a text; convert it to a "
                "tokenizer.json, or mark the token as special in its tokenizer_config.json"
            )

    @property
    def fast(self) -> Any:
        """The ``tokenizers.Tokenizer``; None where the class is written in Python alone."""
        return self.loaded.backend_tokenizer if self.loaded.is_fast else None

    def encode(self, text: str) -> list[int]:
        return self.loaded.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return self.loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        return self.loaded.convert_ids_to_tokens(token) or ""

    def fingerprint(self) -> str:
        if (origin := read_origin(self._folder)) is not None:
            return origin["fingerprint"]
        digest = hashlib.sha256()
        for name in HF_FILES:
            file = self._folder / name
            if file.is_file():
                digest.update(name.encode() + b"\0" + file.read_bytes())
        digest.update(json.dumps(sorted(self._vocab.items()), ensure_ascii=True).encode())
        return digest.hexdigest()


def write_origin(folder: Path, fingerprint: str, add_bos: bool) -> None:
    """Note in an exported ``folder`` the training tokenizer's fingerprint; it holds as long as the files stay."""
    digests = {name: sha256_of(folder / name) for name in _ORIGINALS if (folder / name).is_file()}
    write_json(folder / ORIGIN_FILE, {"fingerprint": fingerprint, "add_bos": add_bos, "sha256": digests})


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What ``write_origin`` has noted; None if there is nothing, or the files are not those that were written."""
    try:
        noted = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        same = all(sha256_of(folder / name) == digest for name, digest in noted["sha256"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return noted if same and noted["sha256"] else None


def _first_of(names: tuple[str, ...], vocab: dict[str, int]) -> int | None:
    return next((vocab[name] for name in names if name in vocab), None)


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
        DataError: as ``build_tokenizer``; it has no beginning-of-text token where add_bos asks for one.
    """
    if data.tokenizer is None:
        return None
    tokenizer = build_tokenizer(data.tokenizer)
    _ = data.tokenizer.add_bos and tokenizer.bos
    return tokenizer


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
