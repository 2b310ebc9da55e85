"""What a lease says of its holder."""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.lease.process import Identity, own_identity
from megatron_sgt.lease.scheduler import Job, own_job

SIZE = 4096
"""Bytes of a lease at least, blanks at its end: it is rewritten in place, and never becomes shorter or longer."""
_LONGEST_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Holder:
    """One holder of one lease. ``token``: random, its own alone.

    ``what``: it is, for people; ``timeout``: seconds of silence after which it counts as dead; ``left``: it has
    found its folder moved away and holds it no more.
    """

    token: str
    what: str
    process: Identity
    job: Job | None
    since: float
    timeout: float
    left: bool = False

    @classmethod
    def here(cls, what: str, timeout: float) -> Holder:
        """This process."""
        return cls(secrets.token_hex(8), what, own_identity(), own_job(), time.time(), timeout)

    def encoded(self, beat: int) -> bytes:
        """The file's content at its ``beat``-th sign of life."""
        text = json.dumps({**asdict(self), "beat": beat, "command": " ".join(sys.argv)[:300]})
        return f"{text:<{SIZE - 1}}\n".encode()

    @classmethod
    def decoded(cls, content: bytes) -> Holder:
        """The holder that a file's content tells.

        Raises:
            ValueError: it is no lease.
        """
        try:
            values = json.loads(content)
            holder = cls(
                token=_text(values["token"]),
                what=_text(values["what"]),
                process=Identity(
                    _text(values["process"]["host"]),
                    _text(values["process"]["space"]),
                    int(values["process"]["pid"]),
                    int(values["process"]["start"]),
                ),
                job=None if values["job"] is None else _job(values["job"]),
                since=float(values["since"]),
                timeout=min(max(0.0, float(values["timeout"])), _LONGEST_TIMEOUT),
                left=bool(values["left"]),
            )
            time.localtime(holder.since)
        except (KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError) as error:
            raise ValueError(f"not a lease: {error!r}") from error
        return holder

    @property
    def name(self) -> str:
        """Who it is, for people: host, process, job."""
        job = f", {self.job.name}" if self.job else ""
        return f"{self.what} on {self.process.host} (pid {self.process.pid}{job})"

    @property
    def began(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))

    @property
    def how_to_end(self) -> str:
        """The command that ends it."""
        if self.job and self.job.kind == "Slurm":
            return f"scancel {self.job.id}"
        return f"kill {self.process.pid} on {self.process.host}"


def _job(values: dict[str, Any]) -> Job:
    kind, number, step, cluster = (_text(values[name]) for name in ("kind", "id", "step", "cluster"))
    return Job(kind, number, step, int(values["restarts"]), cluster)


def _text(value: object) -> str:
    """Printable on one line, whatever a hand or a damage has put there."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return "".join(char if char.isprintable() else "?" for char in value[:200])


def name_of(holder: Holder | None, path: Path) -> str:
    """The holder's name; what is known of one whose lease cannot be read."""
    return f"an unknown writer ({path} is not readable as a lease)" if holder is None else holder.name
