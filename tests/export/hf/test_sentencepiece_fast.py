"""A sentencepiece model and its fast form give the same ids."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron_sgt.data import preprocess, readers, train_tokenizer
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf import sentencepiece_fast
from megatron_sgt.export.hf.sentencepiece_fast import fast_tokenizer, read_pieces

SOURCES = [inspect.getsource(module) for module in (preprocess, readers, train_tokenizer, sentencepiece_fast)]


def train(path: Path, **options: object) -> Path:
    """A model like those of tools/train_tokenizer.py, with ``options`` of sentencepiece on top."""
    settings = {
        "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
        "split_digits": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2,
        "num_threads": 1, "character_coverage": 0.9995,
    }  # fmt: skip
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in SOURCES for line in text.splitlines()),
            model_writer=stream, **{**settings, **options},
        )  # fmt: skip
    return path


def varied_texts() -> list[str]:
    """Code, prose, runs of equal characters, scripts, specials written out, and noise."""
    rng = random.Random(0)
    noise = ["".join(rng.choices("ab  \n\t=-_.01()eé北😀▁", k=rng.randint(1, 60))) for _ in range(800)]
    runs = [f"x{sign * n}y" for sign in " =-#a" for n in range(40)]
    return [*HARD_TEXTS, *SOURCES, *noise, *runs, " ".join(noise)]


OPTIONS = [
    {},
    {"model_type": "unigram", "vocab_size": 500},
    # As Llama 2's, and as sentencepiece's own defaults.
    {"add_dummy_prefix": True},
    {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc",
     "byte_fallback": False, "vocab_size": 400},
    {"user_defined_symbols": ["<|user|>", "<|end|>"], "pad_id": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o.values())) or "ours")
def test_same_ids_and_same_text(tmp_path: Path, options: dict[str, object]) -> None:
    path = train(tmp_path / "m.model", **options)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = read_pieces(path)
    fast = fast_tokenizer(pieces)
    fast.encode_special_tokens = True
    texts = [*varied_texts(), "say <|user|>hello<|end|> now"]
    if options.get("remove_extra_whitespaces"):  # as to other white space, sentencepiece has rules of its own
        texts = [text for text in texts if text.isprintable() and "▁" not in text]
    differing = 0
    for text in texts:
        found, ids = fast.encode(text, add_special_tokens=False).ids, slow.encode(text)
        assert pieces.same_segmentation(found, ids), repr(text)
        differing += found != ids
        if pieces.unk not in ids:  # sentencepiece writes a sign of its own for it
            assert fast.decode(ids, skip_special_tokens=False) == slow.decode(ids), repr(text)
    assert differing == 0 or (pieces.kind == 1 and differing < 0.2 * len(texts))


def test_special_tokens_and_what_pads(tmp_path: Path) -> None:
    ours = read_pieces(train(tmp_path / "a.model"))
    assert (ours.bos, ours.eos, ours.unk, ours.pad, ours.pad_or_stand_in) == (1, 2, 0, None, 0)
    assert [ours.special(n) for n in (1, 2, None)] == ["<s>", "</s>", None]
    other = read_pieces(train(tmp_path / "b.model", byte_fallback=False, vocab_size=400, bos_id=-1, eos_id=1))
    assert (other.bos, other.eos, other.pad_or_stand_in) == (None, 1, 1)


def test_refuses_models_without_a_fast_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a BPE nor a unigram model"):
        read_pieces(train(tmp_path / "w.model", model_type="char", vocab_size=320))
    with pytest.raises(DataError, match="no fast form"):
        read_pieces(train(tmp_path / "s.model", treat_whitespace_as_suffix=True))
