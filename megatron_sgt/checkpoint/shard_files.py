"""Replaces DeepSpeed's own torch.save and torch.load when it writes and reads its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_sgt.checkpoint import layout, weight_parts
from megatron_sgt.checkpoint.host_copy import Arena, compact_copy, host_copy
from megatron_sgt.checkpoint.identity import Identity, load_file
from megatron_sgt.checkpoint.manifest import Files, describe_file
from megatron_sgt.errors import CheckpointError, first_line
from megatron_sgt.files import sync
from megatron_sgt.parallel.collectives import wait_for_all

if TYPE_CHECKING:
    import deepspeed


class ShardFiles:
    """One rank's files of one checkpoint, with the methods that DeepSpeed calls on a checkpoint engine.

    A file that cannot be written raises no error inside DeepSpeed, whose other ranks would wait for this one in a
    barrier; ``finish`` reports it.

    Args:
        arena: copy what is to be written, and let ``finish`` write it; None: write at once.
        dp_rank, dp_size: this rank's share of the weights that all data-parallel ranks have (``weight_parts``).
        about: whose the files are, which is said in them; None where nothing is written.
    """

    def __init__(
        self, arena: Arena | None = None, dp_rank: int = 0, dp_size: int = 1, about: Identity | None = None
    ) -> None:
        self._about = about
        self._arena = arena
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._kept: list[tuple[Any, Path]] = []
        self._problem: OSError | None = None
        self._files: Files = {}
        self._read: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str | Path) -> None:
        own = None
        if self._dp_size > 1 and layout.is_model_file(Path(path).name):
            own = self._share(state_dict[weight_parts.MODULE])
            state_dict = weight_parts.without_weights(state_dict, self._dp_size)
        if self._arena is not None:
            state_dict = host_copy(state_dict, self._arena)
        if own is not None:
            state_dict[weight_parts.MODULE] = own
        self._put(state_dict, Path(path))

    def _put(self, content: Any, path: Path) -> None:
        if self._arena is not None:
            self._kept.append((content, path))
            return
        try:
            self._write(content, path)
        except OSError as error:
            self._problem = self._problem or error

    def save_share(self, module: Mapping[str, Tensor], model_file: Path) -> None:
        """Write this rank's share of ``module``, of which the first data-parallel rank writes ``model_file``."""
        part = model_file.with_name(layout.part_file(model_file.name, self._dp_rank))
        self._put(self._share(module), part)

    def _share(self, module: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = weight_parts.share(module, self._dp_rank, self._dp_size)
        return compact_copy(own, self._arena or Arena(pinned=False))

    def _write(self, content: Any, path: Path) -> None:
        if self._problem is not None:
            return
        try:
            torch.save(content if self._about is None else self._about.stamped(content, path), path)
        except RuntimeError as error:  # torch reports a full disk this way
            raise OSError(first_line(error)) from error
        sync(path)
        self._files[path.name] = describe_file(path) | ({} if self._about is None else {"rank": self._about.rank})

    def finish(self) -> Files:
        """Write what was kept; returns this rank's files, all on disk.

        Raises:
            CheckpointError: one could not be written (disk full, quota, permissions).
        """
        with as_checkpoint_error():
            while self._kept:
                self._write(*self._kept.pop(0))
            if self._problem is not None:
                raise self._problem
        return self._files

    def read(self, paths: Iterable[Path]) -> None:
        """Read files before DeepSpeed asks for them.

        Raises:
            CheckpointError: see ``identity.load_file``.
        """
        for path in paths:
            content = load_file(path, mapped=False)
            if layout.is_model_file(path.name):
                content = weight_parts.merged(content, path, partial(load_file, mapped=False))
            self._read[path] = content

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """The content of a file, on the CPU.

        A file that was not read before (rank 0's weights, whose settings every rank compares) is mapped: only what is
        used is read.
        """
        return self._read.get(Path(path)) or load_file(Path(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: checkpoint/save.py has made the folder. If another run has deleted it, it is not made again."""

    def create(self, info: Any) -> None:
        """Does nothing: checkpoint/save.py makes and commits the folder."""

    def commit(self, info: Any) -> bool:
        """Wait for ranks that still write: the barrier of DeepSpeed that follows would time out."""
        wait_for_all()
        return True

    def is_decoupled(self) -> bool:
        """Irrelevant: DeepSpeed never writes ``latest`` here."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """DeepSpeed need not copy tensors before passing them on."""
        return False


@contextmanager
def redirected_to(files: ShardFiles, engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Let ``engine`` write and read its files through ``files`` inside the context.

    The scripts that DeepSpeed copies into the folder (zero_to_fp32.py) are left out: they read pickles without
    restrictions.
    """
    own, engine.checkpoint_engine = engine.checkpoint_engine, files
    engine._copy_recovery_script = lambda save_path: None
    # DeepSpeed takes the n-th of the sorted names for rank n, but mp_rank_100 sorts before mp_rank_11.
    engine._get_all_ckpt_names = lambda *place: sorted(
        type(engine)._get_all_ckpt_names(engine, *place), key=lambda name: (len(name), name)
    )
    try:
        yield
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script, engine._get_all_ckpt_names


@contextmanager
def as_checkpoint_error(what: str = "") -> Iterator[None]:
    """Turn an OSError into a CheckpointError: ``what``, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}{error}" if what else error.strerror or str(error)) from error
