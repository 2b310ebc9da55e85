"""Reads the pickled files of checkpoints, DeepSpeed's and ours, without running code from them.

The one place where a pickle of a checkpoint is opened: torch's own restricted unpickler, which knows tensors and
plain values, with the few classes that DeepSpeed adds. Their constructors set attributes and nothing else.
"""

from __future__ import annotations

import errno
import io
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_sgt.errors import CheckpointError, DamagedCheckpointError, first_line

_ADVICE = "WeightsUnpickler error: "
"""Stands before the cause, and behind torch's advice to read the file without restrictions."""
_OF_THIS_NODE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "this node has too many open files; free some, or use another node",
    errno.ENOMEM: "this node is out of memory; start fewer processes on it",
    errno.EACCES: "let this user read it",
    errno.ESTALE: "the file server has replaced it; start again",
    errno.ETIMEDOUT: "the file server does not answer; start again",
}
"""Errors that say nothing of the file (an older one would not be read either, or should not be), and what to do."""
_LOOKED_AT = 1 << 24
"""Bytes of a refused pickle that are searched for the names in it."""


def allowed_classes() -> list[Any]:
    """All that DeepSpeed pickles beside tensors and plain Python values."""
    # Not at the top: importing DeepSpeed takes seconds, and it must know its device first.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_restricted(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of one file, its tensors on the CPU; ``mapped``: left on disk, so that only what is used is read.

    Raises:
        DamagedCheckpointError: the file cannot be read, or holds a class that is not on the list: code.
        CheckpointError: this node cannot read it now, whatever it holds.
    """
    try:
        with torch.serialization.safe_globals(allowed_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other versions of pickle, which are read or refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError as error:
        raise CheckpointError(f"{path} cannot be read: {_OF_THIS_NODE[errno.ENOMEM]}") from error
    except Exception as error:  # a damaged pickle provokes any of them
        if isinstance(error, OSError) and error.errno in _OF_THIS_NODE:
            remedy = _OF_THIS_NODE[error.errno]
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
        raise DamagedCheckpointError(f"{path} {_problem(path, error)}") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path} cannot be read: it holds a {type(content).__name__}, not a dict")
    return content


def _problem(path: Path, error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        return "holds code (a TorchScript archive), not loaded"
    if not isinstance(error, OSError) and (names := _unknown_names(path)):
        return f"holds code ({', '.join(names[:3])}), not loaded"
    cause = text.partition(_ADVICE)[2].strip()
    if cause:
        return f"cannot be read: {cause.splitlines()[0]}"
    # Torch's words where they are of the file, not of its own options.
    return f"cannot be read: {'torch.save has not written it' if 'weights' in text else first_line(error)}"


def _unknown_names(path: Path) -> list[str]:
    """What a pickle would import beside what is known and harmless, as module.name; nothing is imported."""
    known = {*torch._weights_only_unpickler._get_allowed_globals()}
    known |= {f"{kind.__module__}.{kind.__qualname__}" for kind in allowed_classes()}
    try:
        names = [*dict.fromkeys(_names_in(_pickle_of(path)))]
    except Exception:  # a damaged archive provokes any; this only looks for better words
        return []
    return [name for name in names if name not in known and name.isprintable()]


def _pickle_of(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            return stream.read(_LOOKED_AT)
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if name is None:
            return b""
        with archive.open(name) as stream:
            return stream.read(_LOOKED_AT)


def _names_in(content: bytes) -> Iterator[str]:
    """module.name of every import in the pickles of ``content``, as far as they can be followed."""
    stream = io.BytesIO(content)
    while stream.tell() < len(content):
        before = stream.tell()
        yield from _names_in_one(stream)
        if stream.tell() == before:
            return


def _names_in_one(stream: io.BytesIO) -> Iterator[str]:
    texts: list[str] = []
    memo: dict[int, str] = {}
    count = 0
    try:
        for code, value, _ in pickletools.genops(stream):
            if code.name in ("GLOBAL", "INST"):
                yield ".".join(str(value).split(" ", 1))
            elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                yield f"{texts[-2]}.{texts[-1]}"
            elif isinstance(value, str):
                texts.append(value)
            elif code.name == "MEMOIZE":
                memo[count] = texts[-1] if texts else ""
                count += 1
            elif code.name in ("BINPUT", "LONG_BINPUT") and isinstance(value, int):
                memo[value] = texts[-1] if texts else ""
            elif code.name in ("BINGET", "LONG_BINGET") and isinstance(value, int):
                texts.append(memo.get(value, ""))
    except (ValueError, IndexError):
        stream.seek(0, io.SEEK_END)
