"""Tokenizers of the kinds that Hugging Face folders hold, with tiny vocabularies, trained in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.export.hf.tokenizer_files import QWEN_WORDS

CHAT = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>{% endfor %}"
_PLAIN = [text for text in HARD_TEXTS if "<" not in text and "[" not in text]


def _save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _template(tokenizer: Tokenizer, single: str) -> Any:
    names = [name for name in single.split() if name != "$A"]
    pair = f"{single} {single.replace('$A', '$B:1')}"
    return processors.TemplateProcessing(single, pair, [(name, tokenizer.token_to_id(name)) for name in names])


def byte_level(special: list[str], size: int = 340, **options: Any) -> Tokenizer:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_PLAIN, trainer)
    return tokenizer


def byte_fallback(special: list[str]) -> Tokenizer:
    """BPE over characters with bytes for the others, as Llama 2 and Gemma have it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    head = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=head, limit_alphabet=80, show_progress=False)
    trained.train_from_iterator(_PLAIN, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(special: list[str], lower: bool = False) -> Tokenizer:
    """A unigram model whose special tokens are pieces of score 0, as T5 and ALBERT have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lower else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False, shrinking_factor=0.5
    )
    tokenizer.train_from_iterator([*_PLAIN, "< / s > [ ] SEP CLS MASK sep cls mask"], trainer)
    return tokenizer


def word_pieces(special: list[str]) -> Tokenizer:
    """WordPiece, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _PLAIN, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return tokenizer


def llama_3(folder: Path) -> Path:
    tokenizer = byte_level([])
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start|>", "<|stop|>"])
    steps = [processors.ByteLevel(trim_offsets=True), _template(tokenizer, "<|begin_of_text|> $A")]
    tokenizer.post_processor = processors.Sequence(steps)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return _save(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", model_max_length=131072,
                 chat_template=CHAT, **names)  # fmt: skip


def llama_2(folder: Path) -> Path:
    tokenizer = byte_fallback(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = _template(tokenizer, "<s> $A")
    return _save(folder, tokenizer, tokenizer_class="LlamaTokenizerFast", add_bos_token=True, add_eos_token=False,
                 bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)  # fmt: skip


def gemma(folder: Path) -> Path:
    tokenizer = byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = _template(tokenizer, "<bos> $A")
    return _save(folder, tokenizer, tokenizer_class="GemmaTokenizerFast", add_bos_token=True, bos_token="<bos>",
                 eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")  # fmt: skip


def bert(folder: Path) -> Path:
    tokenizer = word_pieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = _template(tokenizer, "[CLS] $A [SEP]")
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return _save(folder, tokenizer, tokenizer_class="BertTokenizerFast", do_lower_case=True, **names)


def albert(folder: Path) -> Path:
    tokenizer = unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], lower=True)
    tokenizer.post_processor = _template(tokenizer, "[CLS] $A [SEP]")
    return _save(folder, tokenizer, tokenizer_class="AlbertTokenizerFast", unk_token="<unk>", pad_token="<pad>",
                 cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", bos_token="[CLS]",
                 eos_token="[SEP]")  # fmt: skip


def t5(folder: Path) -> Path:
    tokenizer = unigram(["<pad>", "</s>", "<unk>"])
    more = [f"<extra_id_{n}>" for n in range(3)]
    tokenizer.add_special_tokens(more)
    tokenizer.post_processor = _template(tokenizer, "$A </s>")
    return _save(folder, tokenizer, tokenizer_class="T5TokenizerFast", eos_token="</s>", pad_token="<pad>",
                 unk_token="<unk>", extra_ids=3, additional_special_tokens=more)  # fmt: skip


def roberta(folder: Path) -> Path:
    tokenizer = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _save(folder, tokenizer, tokenizer_class="RobertaTokenizerFast", bos_token="<s>", eos_token="</s>",
                 cls_token="<s>", sep_token="</s>", unk_token="<unk>", pad_token="<pad>",
                 mask_token="<mask>")  # fmt: skip


def qwen_2(folder: Path) -> Path:
    tokenizer = byte_level([])
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return _save(folder, tokenizer, tokenizer_class="Qwen2TokenizerFast", eos_token="<|endoftext|>",
                 pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])  # fmt: skip


def words(folder: Path) -> Path:
    """Whole words between spaces: special tokens are words of the vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[UNK]", "[SEP]", "<eos>", "<bos>"]
    tokenizer.train_from_iterator(_PLAIN, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = _template(tokenizer, "<bos> $A <eos>")
    return _save(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", unk_token="[UNK]", eos_token="<eos>",
                 bos_token="<bos>", sep_token="[SEP]")  # fmt: skip


def bare(folder: Path) -> Path:
    """A ``tokenizer.json`` alone, with a template, truncation and padding, and an end that is no special token."""
    tokenizer = byte_level(["<s>"], ignore_merges=True)
    tokenizer.add_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = _template(tokenizer, "<s> $A </s>")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_token="<s>")
    return _save(folder, tokenizer)


def gpt_2_files(folder: Path) -> Path:
    """The vocabulary and merges of a slow tokenizer."""
    tokenizer = byte_level(["<|endoftext|>"])
    folder.mkdir(parents=True)
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    kind.__name__: kind
    for kind in (llama_3, llama_2, gemma, bert, albert, t5, roberta, qwen_2, words, bare, gpt_2_files)
}
"""Eleven; the sentencepiece models of ``tokenizers`` are the twelfth."""
