"""The tokenizer of a finished folder is compared with that of the training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.export.hf.tokenizer import write_tokenizer
from megatron_sgt.export.to_hf import ExportOptions
from megatron_sgt.export.tokenizer_parity import tokenizer_checks
from tests.helpers.hf_tokenizers import KINDS
from tests.helpers.single import small_config
from tests.helpers.tokenizers import write_sentencepiece


def export_of(source: Path, folder: Path) -> Any:
    wanted = TokenizerConfig.at(source, add_bos=True)
    run = small_config(model={"vocab_size": 1024}, data={"tokenizer": wanted.model_dump()})
    folder.mkdir()
    write_tokenizer(wanted, folder, run)
    return SimpleNamespace(folder=folder, source=SimpleNamespace(config=run), options=ExportOptions())


@pytest.mark.parametrize("kind", ["llama_3", "sentencepiece"])
def test_what_differs_is_seen(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path / "in") if kind in KINDS else write_sentencepiece(tmp_path / "sp.model")
    export = export_of(source, tmp_path / "out")
    (check,) = tokenizer_checks(export)
    assert check.passed and check.line().startswith("tokenizer, differing texts of 24: 0.00e+00")
    none = replace(export.options, write_tokenizer=False)
    assert tokenizer_checks(SimpleNamespace(**vars(export) | {"options": none})) == ()
    file = tmp_path / "out" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": False}))
    (check,) = tokenizer_checks(export)
    assert not check.passed and 0 < check.value < 24 and "the first '" in check.name
    whole = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))
    (check,) = tokenizer_checks(export)
    assert check.value == 24, "no text begins as it should"
