"""Whether the tokenizer of an exported folder is that of the training: on the hard texts, through AutoTokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.export.hf.loading import load_tokenizer, quiet
from megatron_sgt.export.hf.sentencepiece_files import sameness
from megatron_sgt.export.hf.tokenizer import begins_with_bos
from megatron_sgt.export.hf.tokenizer_files import NONE, Sameness, differing_texts
from megatron_sgt.export.parity import Check
from megatron_sgt.export.to_hf import Export


@quiet()
def tokenizer_checks(export: Export) -> tuple[Check, ...]:
    """How many of HARD_TEXTS become other ids in the folder than in training, or other text again; () without one."""
    wanted = export.options.tokenizer or export.source.config.data.tokenizer
    if not export.options.write_tokenizer or wanted is None:
        return ()
    training = build_tokenizer(wanted)
    exported = load_tokenizer(export.folder)
    same = sameness(Path(wanted.model), exported) if wanted.type == "sentencepiece" else Sameness()
    bos = training.bos if begins_with_bos(export.source.config) else None
    found = differing_texts(training, exported, bos, export.options.chat_template != NONE, same)
    first = f", the first {found[0][:20]!r}" if found else ""
    return (Check(f"tokenizer, differing texts of {len(HARD_TEXTS)}{first}", float(len(found)), 0.0),)
