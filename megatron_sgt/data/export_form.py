"""What of a run an export to Hugging Face cannot keep, known before the run."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.config import Config
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.sentencepiece_model import FAST, ExportForm, form_of, read_pieces, slow_or_none
from megatron_sgt.data.tokenizer import AutoTokenizerFolder, build_tokenizer


def export_form(config: TokenizerConfig | None) -> ExportForm:
    """How the tokenizer of ``config`` will be exported.

    Raises:
        DataError: it cannot be read.
    """
    if config is None:
        return FAST
    if config.type == "sentencepiece":
        pieces = read_pieces(Path(config.model))
        form = form_of(pieces, config.add_bos)
        if form == FAST and pieces.own_rules:  # the conversion alone shows whether they have a fast form
            other = slow_or_none(pieces, "it has rules of normalisation of its own", config.add_bos)
            return ExportForm("unsure", other.why) if other.form == "none" else FAST
        return form
    tokenizer = build_tokenizer(config)
    if not isinstance(tokenizer, AutoTokenizerFolder) or tokenizer.fast is not None:
        return FAST
    loaded, beginning = tokenizer.loaded, [tokenizer.bos] if config.add_bos else []
    why = f"a {type(loaded).__name__} exists in Python alone"
    for text in HARD_TEXTS:
        if loaded(text, split_special_tokens=True)["input_ids"] != [*beginning, *tokenizer.encode(text)]:
            return ExportForm("none", f"{why}, and gives other ids by itself")
    return ExportForm("slow", why)


def export_problems(config: Config) -> Iterator[tuple[str, bool]]:
    """What stands against exports of a run, a sentence each, and whether that is certain.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    if ffn_kind(config.model.activation).hidden_act is None:
        yield f"model.activation {config.model.activation}: no exported model can compute this kind", True
    exported = export_form(config.data.tokenizer)
    if exported.may_fail:
        yield str(exported.line), exported.form == "none"
