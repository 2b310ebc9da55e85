"""TensorBoard and Weights & Biases: curves of the numeric fields of every report."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_sgt.config.run import LoggingConfig
from megatron_sgt.errors import ConfigError, first_line
from megatron_sgt.files import Appender, replace_text

# Constants of a run and the axis itself make no curve.
_NO_CURVE = (
    "step",
    "time",
    "train_iters",
    "global_batch_size",
    "exit_code",
    "lagging_rank",
    "spike_step",
    "layer",
    "stage",
    "first_step",
    "last_step",
    "fade_until_step",
    "memory_total_gb",
    "samples",
    "samples_in_set",
    "tokens",
)
_BY_NAME = ("sets", "results", "valid_losses")
"""Fields that hold the values of things that have names."""


class Writer(Protocol):
    """One destination of reports."""

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Take one record (records.py has the fields of every kind)."""

    def advance(self, step: int) -> None:
        """An optimizer step is done, whether or not it is reported."""

    def close(self) -> None:
        """Write what is buffered and release the destination."""


def scalars(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a record: "train/loss" -> number, for every field that is one; of a hook, for its values.

    Those of a named validation set are "valid/NAME/loss", those of a task "tasks/NAME/acc", those of a save
    "save/source_epochs/PREFIX", too.
    """
    if kind == "hook":
        kind, record = f"hook/{record['hook']}", record["values"]
    epochs = record.get("source_epochs") or {}
    record = {**record, **{f"source_epochs/{source}": number for source, number in epochs.items()}}
    found = {
        f"{kind}/{key}": float(value)
        for key, value in record.items()
        if isinstance(value, int | float | Real) and not isinstance(value, bool) and key not in _NO_CURVE
    }
    for key in _BY_NAME:
        for name, value in (record.get(key) or {}).items():
            found |= scalars(f"{kind}/{name}", value if isinstance(value, Mapping) else {"loss": value})
    return found


def check_packages(logging: LoggingConfig) -> None:
    """Check that the packages that ``logging`` asks for are installed, without importing them.

    Raises:
        ConfigError: one is not.
    """
    asked = (
        ("logging.tensorboard", logging.tensorboard, "tensorboard"),
        ("logging.wandb_project", logging.wandb_project is not None, "wandb"),
    )
    for option, wanted, package in asked:
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{option} is set, but {package} is not installed: run 'pip install {package}', or remove {option}"
            )


def _import_for(option: str, module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option} is set, but {package} cannot be imported ({error}): "
            f"run 'pip install {package}', or remove {option}"
        ) from error


class TensorBoardWriter:
    """Event files in ``directory``; a new one where the last was deleted or moved away.

    After a resume at step N, TensorBoard drops the points of later steps that the attempt before has written.

    Raises:
        ConfigError: the tensorboard package is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        option = "logging.tensorboard"
        records = _import_for(option, "tensorboard.summary.writer.record_writer", "tensorboard")
        self._event_pb2 = _import_for(option, "tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summary_pb2 = _import_for(option, "tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._framed = records.RecordWriter
        self._directory = Path(directory)
        self._open()

    def _open(self) -> None:
        now = time.time()
        # TensorBoard's own writer has a thread, which ends at the first error.
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = Appender(self._directory / name)
        self._add(self._event_pb2.Event(wall_time=now, file_version="brain.Event:2"))

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        step, when = int(record["step"]), float(record.get("time", time.time()))
        if not self._file.is_there():
            self._file.close()
            self._open()
        pb2 = self._event_pb2
        if kind == "resume":
            start = pb2.SessionLog(status=pb2.SessionLog.START)
            event = pb2.Event(wall_time=when, step=step + 1, session_log=start)
        else:
            values = [
                self._summary_pb2.Summary.Value(tag=tag, simple_value=value)
                for tag, value in scalars(kind, record).items()
            ]
            event = pb2.Event(wall_time=when, step=step, summary=self._summary_pb2.Summary(value=values))
        self._add(event)

    def _add(self, event: Any) -> None:
        piece = io.BytesIO()
        self._framed(piece).write(event.SerializeToString())
        self._file.append(piece.getvalue())

    def advance(self, step: int) -> None:
        """Nothing: only reports make points."""

    def close(self) -> None:
        self._file.close()


class WandbWriter:
    """One run of Weights & Biases, continued after a resume.

    directory: where wandb keeps its files, and where the run's id is kept in ``wandb_run_id``; config: shown
    beside the curves.

    Raises:
        ConfigError: the package is missing or refuses to start.
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        directory: str | Path = ".",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        wandb = _import_for("logging.wandb_project", "wandb", "wandb")
        id_file = Path(directory) / "wandb_run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(directory),
                config=dict(config or {}),
            )
        except Exception as error:
            raise ConfigError(
                f"Weights & Biases refused project {project!r}: {error}. Log in with 'wandb login', set "
                "WANDB_MODE=offline, or remove logging.wandb_project"
            ) from error
        replace_text(id_file, f"{self._run.id}\n")
        # W&B's own step may not go back, as ours does on a resume: ours is one more curve, and the x axis.
        for kind in ("train", "valid", "tasks", "growth", "grow", "save", "hook"):
            self._run.define_metric(f"{kind}/*", step_metric="step")

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        curves = scalars(kind, record)
        with _as_os_error():
            if kind == "summary":
                self._run.summary.update(curves)
            elif kind not in ("resume", "data", "rollback", "stop", "save_failed", "length", "phase"):
                self._run.log({"step": int(record["step"]), **curves})

    def advance(self, step: int) -> None:
        """Nothing: only reports make points."""

    def close(self) -> None:
        with _as_os_error():
            self._run.finish()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What the client raises, of types of its own, is a destination that fails like a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error
