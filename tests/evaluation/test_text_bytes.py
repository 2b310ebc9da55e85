"""The bytes of tokens: wherever a text is cut, their sum is the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.evaluation.text_bytes import TextBytes
from tests.helpers.tokenizers import TEXT, write_hf_tokenizer, write_sentencepiece

TEXTS = ("the dog", " the  dog ", "北京 и 🙂\n\tx", "", "naïve <|endoftext|> </s>", "\u00e9\u4eac", *HARD_TEXTS)


@pytest.fixture(scope="module", params=["sentencepiece", "space_in_front", "folder", "file"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With bytes of its own in the forms that a tokenizer may have; one puts a space in front of every document."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "space_in_front":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 50), model_prefix=str(folder / "a"), vocab_size=300, byte_fallback=True,
            model_type="bpe", hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        found = build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(folder / "a.model")))
        assert found.piece(found.encode("the")[0]) == "▁the"
        return found
    if request.param == "sentencepiece":
        return build_tokenizer(
            TokenizerConfig(type="sentencepiece", model=str(write_sentencepiece(folder / "a.model")))
        )
    write_hf_tokenizer(folder)
    path = folder if request.param == "folder" else folder / "tokenizer.json"
    return build_tokenizer(TokenizerConfig(type="huggingface", model=str(path)))


def test_of_whole_documents_it_is_the_length_of_their_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if tokenizer.eod not in ids:
            assert TextBytes(tokenizer).count(tokenizer.eod, ids) == len(tokenizer.decode(ids).encode()), text


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_samples_may_cut_characters_and_words(tokenizer: Tokenizer, length: int) -> None:
    """Documents in a row, in samples that know the token before them and nothing else."""
    texts = [text for text in TEXTS if tokenizer.eod not in tokenizer.encode(text)]
    row = [token for text in texts for token in [tokenizer.eod, *tokenizer.encode(text)]]
    counter, total = TextBytes(tokenizer), 0
    for first in range(1, len(row), length):
        total += counter.count(row[first - 1], row[first : first + length])
    assert total == sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in texts)
    assert len(texts) > 20


def test_the_numbers_by_hand(tokenizer: Tokenizer) -> None:
    counter, end = TextBytes(tokenizer), tokenizer.eod
    the = tokenizer.encode("a the")[tokenizer.encode("a the") != tokenizer.encode("a") :][-1:]
    assert counter.count(end, [end, end]) == 0
    assert counter.count(tokenizer.encode("a")[-1], the) == len(" the")
    chinese = tokenizer.encode("京")[-3:]  # three bytes, each a token
    assert [counter.count(chinese[0], [token]) for token in chinese] == [1, 1, 1]


def test_the_sign_for_damaged_text_may_be_a_piece(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{TEXT} \ufffd"] * 50), model_prefix=str(tmp_path / "a"), vocab_size=300,
        minloglevel=2, model_type="bpe", hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity",
    )  # fmt: skip
    found = build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(tmp_path / "a.model")))
    ids = found.encode("a\ufffd")
    assert found.piece(ids[-1]) == "\ufffd" and TextBytes(found).count(ids[0], ids[-1:]) == 3


def test_of_micro_batches_what_the_mask_leaves_counts(tokenizer: Tokenizer) -> None:
    row = [token for text in TEXTS for token in [tokenizer.eod, *tokenizer.encode(text)]]
    cut = torch.tensor(row[: len(row) // 4 * 4 - 3])
    tokens, labels = cut[:-1].view(4, -1), cut[1:].view(4, -1)
    mask = torch.ones(tokens.shape)
    counter = TextBytes(tokenizer)
    assert counter.count_labels(tokens, labels, mask) == counter.count(row[0], cut[1:].tolist())
    mask[1], mask[2, ::2] = 0.0, 0.0
    kept = [(int(t), int(n)) for t, n, m in zip(tokens.flatten(), labels.flatten(), mask.flatten(), strict=True) if m]
    assert counter.count_labels(tokens, labels, mask) == sum(counter.count(t, [n]) for t, n in kept)
