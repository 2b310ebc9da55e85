"""Turns chunks of documents into token arrays, in this process or in several; results keep their order.

Imports no torch, so that worker processes start in a fraction of a second.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process

import numpy as np

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.documents import BadDocument, Chunk, Position, parse
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.errors import SGTError

CHUNKS_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True)
class EncodedKey:
    """The documents of one key: all tokens back to back, and the length of each document."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_empty: int
    """Documents left out because they have no token."""


@dataclass(frozen=True)
class EncodedChunk:
    """An encoded chunk, key by key."""

    keys: tuple[EncodedKey, ...]
    num_repaired: int
    """Texts in which characters that are no Unicode text (lone surrogates) were replaced by ``?``."""
    bytes_read: int
    num_bad: int = 0
    first_bad: BadDocument | None = None
    end: Position | None = None
    """Where in the input the next chunk begins."""


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks with one tokenizer."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool
    dtype: str
    add_bos: bool = False

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Tokenize every document; bad ones are counted, for the caller to judge."""
        beginning = [self.tokenizer.bos] if self.add_bos else []
        ending = [self.tokenizer.eod] if self.append_eod else []
        tokens: list[list[np.ndarray]] = [[] for _ in self.keys]
        empty = [0] * len(self.keys)
        repaired = 0
        bad: list[BadDocument] = []
        for document in parse(chunk, self.keys):
            if isinstance(document, BadDocument):
                bad.append(document)
                continue
            for k, text in enumerate(document):
                clean = text if text.isascii() else text.encode("utf-8", "replace").decode()
                repaired += clean != text
                ids = self.tokenizer.encode(clean)
                if ids:
                    tokens[k].append(np.array(beginning + ids + ending, dtype=self.dtype))
                else:
                    empty[k] += 1
        nothing = np.zeros(0, self.dtype)
        keys = tuple(
            EncodedKey(
                np.concatenate([nothing, *documents]),
                np.array([len(document) for document in documents], dtype=np.int32),
                num_empty,
            )
            for documents, num_empty in zip(tokens, empty, strict=True)
        )
        return EncodedChunk(keys, repaired, chunk.bytes_read, len(bad), next(iter(bad), None), chunk.end)


def encode_chunks(
    chunks: Iterator[Chunk],
    config: TokenizerConfig,
    keys: Sequence[str],
    append_eod: bool,
    dtype: str,
    num_workers: int,
) -> Generator[EncodedChunk, None, None]:
    """Encode ``chunks`` in order; a bounded number of them is in memory at any time.

    Raises:
        SGTError: a worker process dies.
    """
    arguments = (config, tuple(keys), append_eod, dtype)
    if num_workers <= 1:
        yield from map(_make_encoder(*arguments), chunks)
        return
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=arguments
    )
    try:
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= num_workers * CHUNKS_IN_FLIGHT_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise SGTError(
            f"a worker process died, most often because memory ran out; try fewer than {num_workers} --workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_encoder: Encoder | None = None
"""In a worker process: its tokenizer, loaded once by the pool's initializer."""


def _make_encoder(config: TokenizerConfig, keys: tuple[str, ...], append_eod: bool, dtype: str) -> Encoder:
    return Encoder(build_tokenizer(config), keys, append_eod, dtype, config.add_bos)


def _start_worker(config: TokenizerConfig, keys: tuple[str, ...], append_eod: bool, dtype: str) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = _make_encoder(config, keys, append_eod, dtype)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _encoder is not None, "the pool's initializer ran"
    return _encoder(chunk)


def _exit_with_parent() -> None:
    """Without this, the workers of a killed parent would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
