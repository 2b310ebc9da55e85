"""Samples in words, against samples written by hand."""

import torch

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data.sample_view import SampleView, readable, segments
from megatron_sgt.data.tokenizer import build_tokenizer

SAMPLE = {
    "tokens": torch.tensor([11, 12, 13, 21, 22, 0, 0, 0]),
    "position_ids": torch.tensor([0, 1, 2, 0, 1, 0, 1, 2]),
    "loss_mask": torch.tensor([1, 1, 0, 1, 0, 0, 0, 0.0]),
    "document_starts": torch.tensor([0, 0, 0, 3, 3, 5, 5, 5], dtype=torch.int32),
    "num_tokens": torch.tensor(5, dtype=torch.int32),
}


def test_documents_masks_positions_and_padding() -> None:
    first, second, padding = segments(SAMPLE, True, None)
    assert (first.first, first.last, first.positions, first.attends_from, first.not_counted) == (0, 2, (0, 2), 0, (2,))
    assert (second.ids, second.positions, second.attends_from, second.not_counted) == ((21, 22), (0, 1), 3, (4,))
    assert padding.padding and (padding.first, padding.last, padding.not_counted) == (5, 7, ())
    lines = list(SampleView(9, (first, second, padding)).lines())
    assert lines[0] == "sample 9: 5 tokens in 2 documents, 3 of padding; 3 labels count"
    assert lines[2].startswith("  [3 .. 4]  positions 0 .. 1 · attends from 3 · not predicted after 4\n      21 22")
    assert lines[3] == "  [5 .. 7]  padding"
    assert segments(SAMPLE, False, None)[1].attends_from == 0


def test_a_sample_that_tells_no_documents_is_one() -> None:
    plain = {key: SAMPLE[key] for key in ("tokens", "position_ids", "loss_mask")}
    [whole] = segments(plain, False, None)
    assert (whole.first, whole.last, whole.not_counted) == (0, 7, (2, 4, 5, 6, 7))


def test_long_documents_are_shortened_in_lines_alone(sp_model: str) -> None:
    tokenizer = build_tokenizer(TokenizerConfig.at(sp_model))
    text = "growth layer " * 100
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eod]
    assert readable(ids, tokenizer) == f"{tokenizer.piece(tokenizer.bos)}{text}{tokenizer.piece(tokenizer.eod)}"
    sample = {"tokens": torch.tensor(ids), "position_ids": torch.arange(len(ids)), "loss_mask": torch.ones(len(ids))}
    [whole] = segments(sample, False, tokenizer)
    assert whole.text == readable(ids, tokenizer)
    line = whole.line(4)
    assert " ... " in line and len(line) < 400 and line.endswith(f'{tokenizer.piece(tokenizer.eod)}"')
