import multiprocessing
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data.documents import Chunk
from megatron_sgt.data.encoding import Encoder, encode_chunks
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.errors import SGTError


@pytest.fixture
def config(sp_model: str) -> TokenizerConfig:
    return TokenizerConfig(type="sentencepiece", model=sp_model)


def test_lengths_empty_documents_and_keys(config: TokenizerConfig) -> None:
    tokenizer = build_tokenizer(config)
    encoder = Encoder(tokenizer, ("text", "title"), append_eod=True, dtype="uint16")
    done = encoder(Chunk("x", 1, documents=[("layer", ""), ("head gate", "t\udc80"), ("", "")], bytes_read=7))
    text, title = done.keys
    first, second = tokenizer.encode("layer"), tokenizer.encode("head gate")
    assert text.tokens.tolist() == [*first, 2, *second, 2]
    assert text.lengths.tolist() == [len(first) + 1, len(second) + 1]
    assert (text.num_empty, title.num_empty, done.num_repaired, done.bytes_read) == (1, 2, 1, 7)
    assert title.tokens.tolist() == [*tokenizer.encode("t?"), 2]


def test_bounded_number_of_chunks_in_memory(config: TokenizerConfig) -> None:
    """The reader is never far ahead of the consumer."""
    produced = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal produced
        for _ in range(200):
            produced += 1
            yield Chunk("x", 1, documents=[("layer head",)])

    consumed = 0
    for _ in encode_chunks(chunks(), config, ("text",), False, "uint16", num_workers=2):
        consumed += 1
        assert produced <= consumed + 2 * 4
    assert consumed == 200


def test_a_dead_worker_is_a_clear_error(config: TokenizerConfig) -> None:
    def chunks() -> Iterator[Chunk]:
        for number in range(200):
            if number == 20:
                for worker in multiprocessing.active_children():
                    worker.kill()
            yield Chunk("x", 1, documents=[("layer head",)])

    with pytest.raises(SGTError, match="a worker process died, most often because memory ran out; try fewer than 2"):
        list(encode_chunks(chunks(), config, ("text",), False, "uint16", num_workers=2))


def test_workers_need_no_torch() -> None:
    """Importing it would cost every worker seconds and hundreds of megabytes."""
    program = "import sys, megatron_sgt.data.encoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
