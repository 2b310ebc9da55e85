"""Exported folders as a user of transformers loads them, and their tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.shards import INDEX_FILE


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and notes of transformers."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


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


def one_layer_models(folder: Path, trust: bool) -> Callable[[int], Any]:
    """Makes, for any layer, a model of the folder's architecture with that layer's loops as its only one.

    Its vocabulary is 8, its weights are random, its type is fp32.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    config.num_hidden_layers, config.vocab_size = 1, 8
    config.bos_token_id = config.eos_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    loops = dict(getattr(config, "sgt_loops", {}))

    def build(layer: int) -> Any:
        if hasattr(config, "sgt_loops"):
            config.sgt_loops = {"0": loops[str(layer)]} if str(layer) in loops else {}
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=torch.float32).eval()

    return build


class ExportedTensors:
    """The tensors of an exported folder by name, read one at a time.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / INDEX_FILE
        try:
            if index.is_file():
                where = json.loads(index.read_text())["weight_map"]
                files = {name: safe_open(folder / name, "pt") for name in sorted(set(where.values()))}
                self._file_of = {name: files[file] for name, file in where.items()}
            else:
                file = safe_open(folder / "model.safetensors", "pt")
                self._file_of = dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no readable weights: {error}") from error

    def get(self, name: str) -> Tensor:
        """One tensor in fp32."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._folder} holds no {name}")
        return self._file_of[name].get_tensor(name).float()

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin with ``prefix``, by the rest of their names."""
        return {n.removeprefix(prefix): self.get(n) for n in self._file_of if n.startswith(prefix)}
