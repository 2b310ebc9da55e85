"""Trains a sentencepiece tokenizer that reproduces every text exactly."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron_sgt.data.documents import BadDocument, BadDocuments, parse
from megatron_sgt.data.inputs import InputFile, Kind, find_inputs
from megatron_sgt.data.progress import note
from megatron_sgt.data.readers import read_chunks
from megatron_sgt.errors import DataError
from megatron_sgt.files import replacing

ModelType = Literal["bpe", "unigram"]

SAMPLE_BYTES = 100_000_000
FIXED_IDS = 259
"""Unknown, beginning and end of a text, and the 256 bytes."""
PIECE_CHARACTERS = 4000
"""Documents are cut at line ends into pieces of this size: sentencepiece skips long "sentences"."""
NUM_THREADS = 8
"""Fixed: the sums of unigram training, and so the model, depend on it."""
EXPANSION = 5
"""Assumed ratio of text to size of a compressed file, to decide how thinly to sample."""
LEFT_SHARE = 0.25
"""A sample that is full when more than this share of the input is unread is said."""


@dataclass(frozen=True)
class TokenizerReport:
    """What was trained."""

    path: str
    vocab_size: int
    documents: int
    """Documents of the sample."""
    text_bytes: int
    """UTF-8 bytes of the sample."""
    bytes_per_token: float
    """Over the last documents of the sample, up to a megabyte."""
    bad: str | None
    """What to say of bad documents, if there were any."""


@dataclass
class Sample:
    """Documents to train on, and what was met on the way to them."""

    documents: list[str]
    bad: BadDocuments
    read: int = 0
    """Good documents that were looked at."""
    left: float = 0.0
    """Share of the input that is behind the last one."""


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    model_type: ModelType = "bpe",
    json_key: str = "text",
    input_format: Kind | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    overwrite: bool = False,
    max_bad_documents: int = 0,
) -> TokenizerReport:
    """Train on a sample of the documents and write the model to ``output``. Equal arguments give equal bytes.

    Ids: 0 unknown (never produced), 1 ``<s>``, 2 ``</s>`` (the end of a document), 3..258 the bytes, then
    pieces and characters. Nothing is normalised and characters outside the vocabulary become bytes, so
    decoding reproduces the text; the one exception is U+2581 (▁), sentencepiece's sign for a space.

    Raises:
        DataError: unreadable input, more bad documents than ``max_bad_documents``, no text, ``output`` exists, a
            vocabulary size that the text does not allow.
    """
    if Path(output).exists() and not overwrite:
        raise DataError(f"{output} exists already; choose another name or give --overwrite")
    found = find_inputs(inputs, input_format)
    for line in found.notes:
        note(line)
    drawn = sample_documents(found.files, json_key, sample_bytes, seed, max_bad_documents)
    sample = drawn.documents
    if drawn.left > LEFT_SHARE:
        note(f"the sample was full before the last {100 * drawn.left:.0f} % of the input; see --sample-bytes")
    if not sample:
        raise DataError(f"no text to train a tokenizer on in {', '.join(inputs)}")
    model = _train(sample, vocab_size, model_type)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(output)) as temporary:
        temporary.write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return TokenizerReport(
        path=output,
        vocab_size=processor.get_piece_size(),
        documents=len(sample),
        text_bytes=sum(len(text.encode("utf-8", "replace")) for text in sample),
        bytes_per_token=_bytes_per_token(processor.encode, sample),
        bad=drawn.bad.line(drawn.read),
    )


def _train(sample: Sequence[str], vocab_size: int, model_type: ModelType) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * PIECE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Between the library's source line with the failed condition, and an option of its own tool.
        reason = str(error).rpartition("] ")[2].partition(" or decrease character_coverage")[0]
        raise DataError(f"sentencepiece cannot train a vocabulary of {vocab_size} on this text: {reason}") from error
    return model.getvalue()


def sample_documents(
    files: Sequence[InputFile], key: str, sample_bytes: int, seed: int, max_bad_documents: int = 0
) -> Sample:
    """Non-empty documents of all files, about ``sample_bytes`` in all.

    Each is taken or not by a hash of (seed, its number), so the sample is even and repeatable.

    Raises:
        DataError: unreadable input, or more than ``max_bad_documents`` bad ones.
    """
    estimate = sum(file.size * (EXPANSION if file.compression else 1) for file in files)
    keep_below = min(1.0, sample_bytes / max(1, estimate))
    sample = Sample([], BadDocuments(max_bad_documents))
    size, taken = sum(file.size for file in files), 0
    for chunk in read_chunks(files, (key,), say=note):
        for document in parse(chunk, (key,)):
            if isinstance(document, BadDocument):
                sample.bad.add(1, document)
                continue
            (text,) = document
            sample.read += 1
            if text and _unit_hash(seed, sample.read) < keep_below:
                sample.documents.append(text)
                taken += len(text)
        if taken >= sample_bytes:
            sample.left = 1 - chunk.bytes_read / max(1, size)
            break
    return sample


def pieces(documents: Sequence[str]) -> Iterator[str]:
    """The documents cut into pieces of at most PIECE_CHARACTERS, if possible after line ends."""
    for text in documents:
        piece = ""
        for line in text.encode("utf-8", "replace").decode().splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE_CHARACTERS:
                yield piece
                piece = ""
            piece += line
            while len(piece) > PIECE_CHARACTERS:
                yield piece[:PIECE_CHARACTERS]
                piece = piece[PIECE_CHARACTERS:]
        if piece:
            yield piece


def _unit_hash(seed: int, number: int) -> float:
    digest = hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _bytes_per_token(encode: Callable[[str], list[int]], sample: Sequence[str]) -> float:
    num_bytes = num_tokens = 0
    for text in reversed(sample):
        num_bytes += len(text.encode("utf-8", "replace"))
        num_tokens += len(encode(text.encode("utf-8", "replace").decode()))
        if num_bytes >= 1_000_000:
            break
    return num_bytes / max(1, num_tokens)
