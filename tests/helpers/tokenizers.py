"""Small tokenizers as folders and files that a user may have."""

from __future__ import annotations

from pathlib import Path

from megatron_sgt.data.train_tokenizer import train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and the other dog sleeps under the warm brown stone"
HF_VOCAB_SIZE = 280


def write_hf_tokenizer(folder: Path, text: str = TEXT, vocab_size: int = HF_VOCAB_SIZE) -> Path:
    """A byte-level BPE with an end-of-text token, as ``save_pretrained`` writes it; returns ``folder``."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


def write_sentencepiece(path: Path, vocab_size: int = 300) -> Path:
    """A sentencepiece model with byte fallback; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    corpus = path.with_suffix(".txt")
    corpus.write_text(f"{TEXT}\n" * 50)
    train_tokenizer([str(corpus)], str(path), vocab_size=vocab_size)
    corpus.unlink()
    return path
