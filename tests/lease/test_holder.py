"""What a lease says of its holder, and what is read of one that a hand has edited."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_sgt.lease.holder import SIZE, Holder
from megatron_sgt.lease.scheduler import Job
from tests.helpers.leases import elsewhere


def test_names_for_people() -> None:
    holder = elsewhere(job=Job("PBS", "7.server"))
    assert holder.name == "a run on node7 (pid 4711, PBS job 7.server)" and holder.how_to_end == "kill 4711 on node7"
    assert dataclasses.replace(holder, job=Job("Slurm", "7")).how_to_end == "scancel 7"
    assert elsewhere().name == "a run on node7 (pid 4711)"


@pytest.mark.parametrize("job", [None, Job("Slurm", "7", "2", 1, "c")])
def test_what_is_written_is_read(job: Job | None) -> None:
    holder = elsewhere(job=job)
    assert Holder.decoded(holder.encoded(3)) == holder
    assert len(holder.encoded(3)) == len(holder.encoded(10**9)) == SIZE, "rewritten in place"


def test_what_is_printed_stays_on_one_line() -> None:
    evil = elsewhere(what="a\nrun\x1b[0m", timeout=1e9)
    read = Holder.decoded(evil.encoded(1))
    assert read.what == "a?run?[0m" and read.timeout == 3600.0, "nobody waits for days"


UNREADABLE = {
    "empty": b"",
    "cut": b"{",
    "deep": b"[" * 60_000,
    "a number": b'{"token": 7}',
    "bytes": b"\xff\xfe",
    "a list": b"[]",
    "incomplete": b'{"token":"a","what":"b","process":{},"job":null}',
    "no time": elsewhere(since=1e300).encoded(1),
    "not a number": elsewhere(timeout=float("nan")).encoded(1).replace(b"NaN", b'"x"'),
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_lease(content: bytes) -> None:
    with pytest.raises(ValueError):
        Holder.decoded(content)
