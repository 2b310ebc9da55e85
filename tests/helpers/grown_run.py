"""One tiny run for all tests that look at what a run leaves behind: grown, tensor parallel 2, its vocabulary padded,
with a tokenizer and validation. Trained once per test session."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.data.writer import DatasetWriter
from megatron_sgt.export.forms import STANDARD, Form
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, reported, tiny_config
from tests.helpers.tokenizers import TEXT, write_sentencepiece

VOCAB_SIZE, PADDED = 300, 304
CONTEXT = 48


@cache
def folder() -> Path:
    """Where everything lies; deleted when the tests end."""
    made = Path(tempfile.mkdtemp(prefix="grown_run_"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def checkpoints() -> Path:
    """The run's folder of checkpoints: steps 9 and 18."""
    tokenizer = {
        "type": "sentencepiece",
        "model": str(write_sentencepiece(folder() / "sp.model", VOCAB_SIZE)),
    }
    config = tiny_config(
        folder() / "run",
        write_words(folder() / "words", TokenizerConfig.model_validate(tokenizer)),
        model={
            "vocab_size": None, "seq_length": CONTEXT, "num_query_groups": 2, "qk_layernorm": True,
            "init_method_std": 0.1,
        },
        data={"tokenizer": tokenizer},
        parallel={"tensor_model_parallel_size": 2},
        checkpoint={"save_interval": 9},
    )  # fmt: skip
    run_on_ranks(2, pretrain, config)
    return folder() / "run" / "checkpoints"


def export(form: Form = STANDARD) -> Path:
    """The last checkpoint as a Hugging Face folder in fp32."""
    made = folder() / f"hf_{form.name}"
    if not made.exists():
        export_checkpoint(checkpoints(), made, options=ExportOptions(dtype="fp32", form=form))
    return made


def data_prefix() -> str:
    """The run's data set."""
    checkpoints()
    return str(folder() / "words")


def validation_losses() -> dict[int, float]:
    """Step -> the loss that the run itself has measured and logged."""
    checkpoints()
    return {record["step"]: record["loss"] for record in reported(folder() / "run", "valid")}


def write_words(prefix: Path, tokenizer: TokenizerConfig) -> str:
    """A data set of sentences of random words, tokenized; returns its prefix."""
    rng, words = random.Random(3), TEXT.split()
    cutter = build_tokenizer(tokenizer)
    texts = [" ".join(rng.choices(words, k=rng.randint(10, 40))) for _ in range(150)]
    encoded = [[*cutter.encode(text), cutter.eod] for text in texts]
    tokens = np.array([token for row in encoded for token in row], np.uint16)
    lengths = np.array([len(row) for row in encoded], np.int32)
    with DatasetWriter(str(prefix), "uint16", overwrite=False) as writer:
        writer.add(EncodedKey(tokens, lengths, 0))
        writer.commit({"tokenizer": cutter.name, "tokenizer_fingerprint": cutter.fingerprint()})
    return str(prefix)
