"""What a sentencepiece model file says, and in which form its export carries it: decided by the file alone, cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sgt.errors import DataError

SPACE = "\u2581"
"""What sentencepiece writes for a space."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
_KNOWN_RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
TIE = 1e-3
"""Difference of log-likelihoods that counts as none: single precision, summed over a text."""


@dataclass(frozen=True)
class Pieces:
    """What a sentencepiece model file says. ``pieces``: (text, score, kind) by id; ids are None where unset."""

    pieces: tuple[tuple[str, float, int], ...]
    kind: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    suffix: bool
    """Whether a space belongs to the word before it."""
    charsmap: bytes
    """Rules of normalisation, as sentencepiece compiles them."""
    own_rules: bool
    """Whether they are the user's, and not sentencepiece's."""
    rewrites_decoded: bool
    """Whether decoding has rules of its own, too."""
    unknown_surface: str
    """What decoding writes for an unknown character."""
    bos: int | None
    eos: int | None
    unk: int
    pad: int | None

    def special(self, index: int | None) -> str | None:
        return None if index is None else self.pieces[index][0]

    def texts(self, *kinds: int) -> list[str]:
        """The pieces of ``kinds``, in the order of their ids."""
        return [text for text, _, kind in self.pieces if kind in kinds]

    @property
    def space(self) -> str:
        """What stands for a space in its pieces."""
        return SPACE if self.escape_whitespaces else " "

    @property
    def user_defined(self) -> list[str]:
        """The user-defined symbols that a text can hold once spaces are escaped."""
        return [text for text in self.texts(USER_DEFINED) if not self.escape_whitespaces or " " not in text]

    @property
    def spells_special_tokens(self) -> bool:
        """Whether every character of special tokens and of the names of bytes is a piece."""
        known = set(self.texts(NORMAL))
        return all(known.issuperset(text) for text in self.texts(CONTROL, UNKNOWN, BYTE))

    def same_segmentation(self, one: list[int], other: list[int]) -> bool:
        """Whether two encodings of a text are the same, or equally likely under a unigram model."""
        if self.kind != UNIGRAM or one == other:
            return one == other
        likelihoods = [sum(self.pieces[index][1] for index in ids) for ids in (one, other)]
        return abs(likelihoods[0] - likelihoods[1]) < TIE

    @property
    def pad_or_stand_in(self) -> int | None:
        """The padding token; without one, unknown where no text can produce it, else the end of a text."""
        return self.pad if self.pad is not None else self.unk if self.byte_fallback else self.eos


def read_pieces(path: Path) -> Pieces:
    """Read a model file.

    Raises:
        DataError: it cannot be read, or is not a sentencepiece model.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise DataError(f"tokenizer model {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # of protobuf's own kind
        raise DataError(f"{path} is not a sentencepiece model; give the .model file") from error
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = tuple((p.piece, p.score, p.type) for p in proto.pieces)
    kinds = {text: (index, kind) for index, (text, _, kind) in enumerate(pieces)}

    def control(text: str) -> int | None:
        index, kind = kinds.get(text, (None, None))
        return index if kind == CONTROL else None

    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unknown is None:
        raise DataError(f"{path} is not a sentencepiece model: it has no unknown piece; give the .model file")
    return Pieces(
        pieces=pieces,
        kind=trainer.model_type,
        byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=rules.add_dummy_prefix,
        remove_extra_whitespaces=rules.remove_extra_whitespaces,
        escape_whitespaces=rules.escape_whitespaces,
        suffix=trainer.treat_whitespace_as_suffix,
        charsmap=rules.precompiled_charsmap,
        own_rules=rules.name not in _KNOWN_RULES and bool(rules.precompiled_charsmap),
        rewrites_decoded=bool(proto.denormalizer_spec.precompiled_charsmap),
        unknown_surface=trainer.unk_surface,
        bos=control(trainer.bos_piece),
        eos=control(trainer.eos_piece),
        unk=unknown,
        pad=control(trainer.pad_piece),
    )


@dataclass(frozen=True)
class ExportForm:
    """How a tokenizer is exported. ``why``: what stands against a better form, a phrase; empty for a fast one.

    fast: a tokenizer.json. slow: a class of transformers around sentencepiece itself. none: neither gives the same ids.
    unsure: fast or none, which the export finds out.
    """

    form: Literal["fast", "slow", "none", "unsure"]
    why: str = ""

    @property
    def may_fail(self) -> bool:
        """Whether an export with the tokenizer is refused, or may be."""
        return self.form in ("none", "unsure")

    @property
    def line(self) -> str | None:
        """What the user of the training tokenizer should know before training, a sentence; None for a fast one."""
        if self.form == "fast":
            return None
        if self.form == "slow":
            return f"the tokenizer has no fast form ({self.why}): an export holds a slow one of the same ids"
        if self.form == "unsure":
            known = (
                f"the tokenizer may have no form in transformers with the same ids ({self.why}), which the export of "
                "an early checkpoint shows; without one"
            )
        else:
            known = f"the tokenizer has no form in transformers, fast or slow, with the same ids: {self.why};"
        return (
            f"{known} an export needs --tokenizer none and a tokenizer of your own; tools/train_tokenizer.py makes one "
            "that can be exported"
        )


FAST = ExportForm("fast")


def form_of(model: Pieces, add_bos: bool = False) -> ExportForm:
    """How the model is exported; ``add_bos``: its texts begin with the beginning-of-text token."""
    why = _not_fast(model)
    return FAST if why is None else slow_or_none(model, why, add_bos)


def slow_or_none(model: Pieces, why: str, add_bos: bool) -> ExportForm:
    """How the model is exported, of which ``why`` says that it has no fast form."""
    if add_bos:
        return ExportForm("none", f"{why}, and the slow class begins no text with a token (add_bos)")
    # The slow class looks up what sentencepiece gives as text: of characters that are all unknown, the text itself.
    known = set(model.texts(NORMAL, USER_DEFINED))
    mistaken = [text for text in model.texts(CONTROL, UNKNOWN) if known.isdisjoint(text)]
    if mistaken and not model.byte_fallback and model.kind != WORD:
        return ExportForm("none", f"{why}, and the slow class takes {mistaken[0]!r} in a text for the special token")
    return ExportForm("slow", why)


def _not_fast(model: Pieces) -> str | None:
    """Why no fast tokenizer gives the same ids and the same text, None if one does."""
    normal = model.texts(NORMAL)
    single = set(normal)
    if model.rewrites_decoded:
        return "it has rules for decoded text"
    if model.kind == WORD:
        return "it is a model of whole words"
    if model.remove_extra_whitespaces:
        spaced = [text for text in model.texts(USER_DEFINED) if " " in text]
        if any(text.strip(" ") for text in spaced) or (spaced and model.charsmap):
            return f"it removes spaces, but not those of its user-defined symbol {spaced[0]!r}"
    short = [text for text in model.texts(CONTROL, UNKNOWN) if len(text) == 1]
    if short and model.kind in (BPE, CHAR):  # the library would find it in a text
        return f"its special token {short[0]!r} is one character"
    if model.kind == UNIGRAM:
        # A fast unigram model would find the special token in a text, where its characters are unknown.
        for text in model.texts(CONTROL, UNKNOWN, BYTE):
            if len(text) == 1 or not (text.isascii() or set(text) <= single):
                return f"not every character of its special token {text!r} is a piece"
    if model.kind == BPE:
        if model.texts(UNUSED):
            return "it has pieces marked as unused"
        if lacking := set().union(*normal) - single:
            return f"pieces of it hold {min(lacking)!r}, which is no piece"
        scores = [score for text, score, kind in model.pieces if kind == NORMAL and len(text) > 1]
        if len(set(scores)) < len(scores):
            return "pieces of it have the same score"
    return None
