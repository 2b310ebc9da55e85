"""The sample indices of one data set, built once by rank 0 and shared, completely or not at all.

They are Megatron's own, or those of packed documents (packed_index.py).

Megatron's own cache is keyed by the path of the data and written in place, so a rebuilt corpus or a killed job can
leave indices that match no data. Here the key covers everything that the indices depend on, and a folder gets its final
name only when it is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_sgt.config.data import DataConfig
from megatron_sgt.data.indexed import sequence_lengths
from megatron_sgt.data.packed_index import VERSION as PACKING_VERSION
from megatron_sgt.data.packed_index import open_packing, save_packing
from megatron_sgt.data.packed_samples import PackedSamples
from megatron_sgt.data.splits import SplitPart
from megatron_sgt.errors import DataError
from megatron_sgt.files import commit, sync_all

EVAL_SEED = 0
"""Validation and test ignore the seed of the run: runs that differ in it are measured on the same samples."""
VISIBLE_AFTER_SECONDS = 60.0
"""How long a rank waits for rank 0's cache to appear: network file systems list new folders late."""
_NPY = b"\x93NUMPY"
"""How NumPy's files begin; what begins otherwise ``numpy.load`` takes for a pickle."""


def megatron_datasets() -> ModuleType:
    """The module ``megatron.core.datasets.gpt_dataset``, imported without warnings about absent packages.

    Raises:
        DataError: megatron-core lacks the compiled index builder, which no wheel does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import gpt_dataset

        try:
            from megatron.core.datasets import helpers_cpp  # noqa: F401
        except ImportError as error:
            folder = os.path.dirname(str(gpt_dataset.__file__))
            raise DataError(
                f"megatron-core was installed without its compiled index builder (helpers_cpp in {folder}): "
                f"{error}; install a wheel of it (pip install --only-binary megatron-core megatron-core), or "
                f"run: make -C {folder}"
            ) from error
    return gpt_dataset


def index_folder(
    prefix: str,
    parts: tuple[SplitPart, ...],
    lengths_digest: str,
    seq_length: int,
    seed: int,
    cache_root: str,
    packing: str = "concat",
) -> Path:
    """Where ``build_index_cache`` keeps the indices."""
    made_by = megatron_version() if packing == "concat" else [packing, PACKING_VERSION]
    key = json.dumps([lengths_digest, [[p.first, p.last] for p in parts], seq_length, seed, made_by])
    return Path(cache_root) / f"{Path(prefix).name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def build_index_cache(
    prefix: str,
    parts: tuple[SplitPart, ...],
    lengths_digest: str,
    seq_length: int,
    seed: int,
    cache_root: str,
    packing: str = "concat",
) -> str:
    """Build the indices of every non-empty split of ``prefix``, unless they are there; returns their folder.

    Raises:
        DataError: ``cache_root`` cannot be written.
    """
    folder = index_folder(prefix, parts, lengths_digest, seq_length, seed, cache_root, packing)
    if folder.is_dir():
        return str(folder)
    name = folder.name
    try:
        Path(cache_root).mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix=f"{name}.unfinished-", dir=cache_root)
    except OSError as error:
        raise DataError(
            f"cannot write the sample indices to data_cache_path {cache_root}: {error.strerror}; "
            "set data.data_cache_path to a writable folder"
        ) from error
    try:
        for part in parts:
            if part.samples and packing == "concat":
                open_split(prefix, part, seq_length, seed, unfinished)
            elif part.samples:
                save_packing(unfinished, part, sequence_lengths(prefix), seq_length, _seed_of(part, seed))
        os.chmod(unfinished, 0o755)
        sync_all(Path(unfinished))
        with contextlib.suppress(OSError):  # another job was faster; its folder has the same content
            commit(Path(unfinished), folder)
        if not folder.is_dir():
            raise DataError(f"cannot write {folder}; set data.data_cache_path to a writable folder")
    except OSError as error:
        raise DataError(f"cannot write the sample indices to {cache_root}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def open_split(prefix: str, part: SplitPart, seq_length: int, seed: int, folder: str) -> Any:
    """The one-epoch GPTDataset of one split, its indices in ``folder`` (built there by rank 0 if missing)."""
    gpt = megatron_datasets()
    config = gpt.GPTDatasetConfig(
        random_seed=_seed_of(part, seed) % 2**32,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="1",
        path_to_cache=folder,
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    check_indices(folder)
    sequences = gpt.GPTDataset.build_low_level_dataset(prefix, config)
    chosen = np.arange(part.first, part.last, dtype=np.int32)
    split = gpt.Split[part.name]
    return gpt.GPTDataset(sequences, Path(prefix).name, chosen, None, split, config)


def open_packed(prefix: str, part: SplitPart, seq_length: int, folder: str, data: DataConfig) -> PackedSamples:
    """The one epoch of packed sequences of one split, its indices in ``folder``."""
    check_indices(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        documents = megatron_datasets().IndexedDataset(prefix)
    return PackedSamples(documents, *open_packing(folder, part), seq_length, data)


def _seed_of(part: SplitPart, seed: int) -> int:
    return seed if part.name == "train" else EVAL_SEED


def check_indices(folder: str) -> None:
    """Refuse a ``folder`` of indices that holds a pickle: Megatron-Core would run the code in it.

    Raises:
        DataError: naming the file.
    """
    for path in sorted(Path(folder).glob("*.npy")):
        try:
            with path.open("rb") as stream:
                start = stream.read(len(_NPY))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if start != _NPY:
            raise DataError(f"{path} is no NumPy array, not loaded; delete {folder}, and it is built again")


def wait_for_folder(folder: str, patience_seconds: float = VISIBLE_AFTER_SECONDS) -> None:
    """Return once ``folder`` is visible here; DataError if it does not appear in time."""
    deadline = time.monotonic() + patience_seconds
    while not os.path.isdir(folder):
        if time.monotonic() > deadline:
            raise DataError(
                f"rank 0 wrote the sample indices to {folder}, which cannot be seen from "
                f"{os.uname().nodename}; set data.data_cache_path to a folder that all nodes share"
            )
        time.sleep(0.2)


def megatron_version() -> str:
    """Version of megatron-core, installed or a checkout: its index builder decides what is in the cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import __version__

    return __version__


class _NoTokenizer:
    """What GPTDataset needs of a tokenizer when masks and positions ignore document ends."""

    vocab_size = None
    eod = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 (read only)
