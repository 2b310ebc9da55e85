"""Exported folders as a user of transformers loads them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from megatron_sgt.compat.quiet import quiet_logs
from megatron_sgt.export.forms import Form


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and notes of transformers off the console; what matters becomes an error."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet_logs():
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def own_class(form: Form, auto: str) -> Any:
    """This package's class of ``form`` for transformers' class ``auto``: what a folder's own code would define."""
    module, name = form.auto_map[auto].split(".")
    return getattr(importlib.import_module(f"megatron_sgt.export.hf.{module}"), name)


def load_exported(folder: Path, dtype: torch.dtype | str, trust: bool) -> Any:
    """The model in ``folder``, in evaluation mode on the CPU.

    Args:
        dtype: to compute in; "auto": the one that is stored.
        trust: run the code in the folder; only for a folder that this process has written itself, or at the
            user's word.
    """
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust, local_files_only=True
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``."""
    with quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def only_greedy(model: Any) -> list[int]:
    """Let ``model`` generate its most likely tokens; returns the ids that end a text.

    What else an imported generation_config.json asks for (a repetition penalty, sampling, least lengths) would choose
    other tokens.
    """
    given = model.generation_config
    kept = {name: getattr(given, name) for name in ("eos_token_id", "pad_token_id", "suppress_tokens")}
    model.generation_config = GenerationConfig(do_sample=False, num_beams=1, **kept)
    ends = kept["eos_token_id"]
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def one_layer_models(folder: Path, trust: bool) -> Callable[[int], Any]:
    """Makes, for any layer, a model of the folder's architecture with that layer's loops as its only one.

    Its vocabulary is 8, its weights are random, its type is fp32.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    config.vocab_size = 8
    config.bos_token_id = config.eos_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    loops = dict(getattr(config, "sgt_loops", {}))

    def build(layer: int) -> Any:
        config.num_hidden_layers = 1
        if hasattr(config, "sgt_loops"):
            config.sgt_loops = {"0": loops[str(layer)]} if str(layer) in loops else {}
        if hasattr(config, "sgt_num_layers"):
            config.sgt_num_layers, config.num_hidden_layers = 1, config.passes_of(0)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=torch.float32).eval()

    return build
