"""Files that transformers reads a fast tokenizer from, so that ``tokenizer(text)`` is what training saw, and no more.

The tokenizer is written as training ran it, whatever class of transformers it came from, and is read by the one class
that takes ``tokenizer.json`` as it is: the others build parts of it anew and add the special tokens that they know.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import Tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.loading import load_tokenizer
from megatron_sgt.files import write_json, write_text

CLASS = "PreTrainedTokenizerFast"
"""The one name that transformers 4 and 5 both know."""
NONE, KEEP = "none", "keep"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What counts as a word, in the tokenizer.json of Qwen2 and Qwen2.5."""
CHAT_NOTE = (
    "It has a chat template, so special tokens written out in a text are read as special tokens; training read them "
    "as text, as `tokenizer(text, split_special_tokens=True)` does."
)


@dataclass(frozen=True)
class Settings:
    """What a folder's tokenizer does beyond cutting text.

    max_length: tokens of the model's context. bos: the token, with its id, that begins every text; None: none does.
    special: named special tokens (``NAMED``). others: further special tokens. chat_template: None: there is none.
    """

    max_length: int
    bos: tuple[str, int] | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    padding_side: str = "left"
    chat_template: str | None = None


def write_files(fast: FastTokenizer, settings: Settings, folder: Path) -> None:
    """Write ``fast``, and how transformers is to use it, into ``folder``.

    Raises:
        OSError: they cannot be written.
    """
    parts = json.loads(fast.to_str())
    # A template is what adds tokens to a text; truncation and padding are the user's affair.
    parts |= {"post_processor": _post_processor(parts, settings.bos), "truncation": None, "padding": None}
    FastTokenizer.from_str(json.dumps(parts)).save(str(folder / "tokenizer.json"))
    values = _values(settings) | {"tokenizer_class": CLASS, **settings.special}
    if settings.bos is not None:
        values["bos_token"] = settings.bos[0]
    if settings.others:
        values["additional_special_tokens"] = list(settings.others)
    if "add_prefix_space" in (parts["pre_tokenizer"] or {}):  # transformers 4 would set it to false
        values["add_prefix_space"] = parts["pre_tokenizer"]["add_prefix_space"]
    write_json(folder / "tokenizer_config.json", values)
    write_json(folder / "special_tokens_map.json", {name: values[name] for name in NAMED if name in values})
    _write_chat_template(settings, folder)


def write_slow(loaded: Any, settings: Settings, folder: Path, training: Tokenizer) -> None:
    """Write a tokenizer of transformers that is written in Python alone, whose class does what it does.

    Raises:
        DataError: texts would become other ids than in ``training``.
    """
    loaded.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["pad_token"] = settings.special.get("pad_token")
    write_json(file, {name: v for name, v in values.items() if name != "chat_template"} | _values(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write_chat_template(settings, folder)
    _check_slow(type(loaded).__name__, settings, folder, training, Sameness())


def write_slow_class(name: str, settings: Settings, folder: Path, training: Tokenizer) -> None:
    """Write how transformers is to use its class ``name``, in Python alone, whose own file is in ``folder`` already.

    Raises:
        DataError: texts would become other ids than in ``training``.
    """
    special = dict(settings.special)
    # Those that the class would take for granted are named, too: as none.
    values = {"tokenizer_class": name} | dict.fromkeys(NAMED) | special | _values(settings)
    write_json(folder / "tokenizer_config.json", values)
    write_json(folder / "special_tokens_map.json", special)
    _write_chat_template(settings, folder)
    _check_slow(name, settings, folder, training, Sameness(text=False))


def _check_slow(name: str, settings: Settings, folder: Path, training: Tokenizer, same: Sameness) -> None:
    bos = None if settings.bos is None else settings.bos[1]
    if found := differing_texts(training, load_tokenizer(folder), bos, settings.chat_template is not None, same):
        raise DataError(
            f"tokenizer {training.name} is a {name}, which exists in Python alone and makes other ids "
            f"of {found[0][:30]!r} by itself than training had; convert it to a tokenizer.json, or "
            "give --tokenizer none and put a tokenizer into the folder yourself"
        )


@dataclass(frozen=True)
class Sameness:
    """When two tokenizers count as one. ids: which are the same; text: whether that of the ids is compared, too."""

    ids: Callable[[list[int], list[int]], bool] = operator.eq
    text: bool = True


def differing_texts(
    training: Tokenizer, exported: Any, bos: int | None, as_text: bool = False, same: Sameness | None = None
) -> tuple[str, ...]:
    """Those of HARD_TEXTS of which ``exported``, of transformers, makes other ids than training, or another text again.

    Args:
        bos: what begins every text.
        as_text: ask ``exported`` to take special tokens in a text as text.
    """
    beginning, options = [] if bos is None else [bos], {"split_special_tokens": True} if as_text else {}
    same = same or Sameness()
    differing = []
    for text in HARD_TEXTS:
        ids, found = training.encode(text), exported(text, **options)["input_ids"]
        back = exported.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        fits = found[: len(beginning)] == beginning and same.ids(found[len(beginning) :], ids)
        if not fits or (same.text and back != training.decode(ids)):
            differing.append(text)
    return tuple(differing)


def cuts_as_qwen(fast: FastTokenizer | None) -> bool:
    """Whether ``fast`` cuts text as Qwen2's tokenizer.

    Beside a model of the type ``qwen2``, transformers 5 takes no other one: it keeps vocabulary and merges of any, and
    cuts text by Qwen2's rules.
    """
    if fast is None:
        return False
    parts = json.loads(fast.to_str())
    model, steps = parts["model"], (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return False
    if parts["normalizer"] != {"type": "NFC"} or [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    return steps[0]["pattern"] == {"Regex": QWEN_WORDS} and not steps[1]["add_prefix_space"]


def of_loaded(settings: Settings, loaded: Any) -> Settings:
    """``settings`` with what ``loaded``, a tokenizer of transformers, says of special tokens and padding."""
    known = loaded.special_tokens_map
    extra = getattr(loaded, "extra_special_tokens", None) or getattr(loaded, "additional_special_tokens", None)
    return replace(
        settings,
        special={name: str(known[name]) for name in NAMED if known.get(name)},
        others=tuple(map(str, extra)) if isinstance(extra, list) else (),
        padding_side=loaded.init_kwargs.get("padding_side", "left"),
    )


def notes_of(settings: Settings, adds_others: bool = False, had_template: bool = False) -> tuple[str, ...]:
    """What the card says of a folder's tokenizer.

    Args:
        adds_others: the tokenizer adds special tokens to a text by itself, which training did not.
        had_template: it has a chat template of its own.
    """
    notes = []
    if settings.bos is not None:
        notes.append(f"Every text begins with `{settings.bos[0]}`, as every document of the training data did.")
    elif adds_others:
        notes.append(
            "It adds no special tokens to a text, since training saw none; the tokenizer that it was made from does."
        )
    if settings.chat_template is not None:
        notes.append(CHAT_NOTE)
    elif had_template:
        notes.append("The chat template of the tokenizer is left out: `--chat-template keep` exports it.")
    return tuple(notes)


def _values(settings: Settings) -> dict[str, Any]:
    return {
        "model_max_length": settings.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": settings.padding_side,
        "clean_up_tokenization_spaces": False,
        # A special token written out in a text is text, as it was in training; a chat template writes them.
        "split_special_tokens": settings.chat_template is None,
    }


def _write_chat_template(settings: Settings, folder: Path) -> None:
    if settings.chat_template is not None:
        write_text(folder / "chat_template.jinja", settings.chat_template)


def _post_processor(parts: dict[str, Any], bos: tuple[str, int] | None) -> dict[str, Any] | None:
    """What has no part in the ids but in their places in the text (byte-level), then ``bos``."""
    before = parts["post_processor"] or {}
    steps = [step for step in before.get("processors", [before]) if step.get("type") == "ByteLevel"]
    if bos is not None:
        token, index = bos
        first = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        known = {token: {"id": token, "ids": [index], "tokens": [token]}}
        steps.append({"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": known})
    return None if not steps else steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}


def chat_template_of(wanted: str, loaded: Any) -> str | None:
    """The chat template to export.

    Args:
        wanted: NONE, KEEP (that of ``loaded``, a tokenizer of transformers, None without one), or a file.

    Raises:
        DataError: there is no such template.
    """
    if wanted == NONE:
        return None
    if wanted == KEEP:
        found = getattr(loaded, "chat_template", None)
        found = found.get("default") if isinstance(found, dict) else found
        if not found:
            raise DataError("--chat-template keep: the tokenizer has no chat template; give a file, or leave it out")
        return found
    try:
        return Path(wanted).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {wanted} cannot be read as text: {error}; give a Jinja file") from error
