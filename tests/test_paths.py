"""What is made of ``~`` and variables in a path. Every setting and argument that is one: tests/edges/test_paths.py."""

import os
from pathlib import Path

import pytest

from megatron_sgt.paths import as_recorded, expand, expand_for_job, expand_in_script

ENVIRON = {
    "HOME": "/home/me",
    "SCRATCH": "/scratch/me",
    "A1": "x y",
    "TILDE": "~/data",
    "EMPTY": "",
    "NESTED": "$SCRATCH/a",
}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("runs/a", "runs/a"),
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("~root/a", os.path.expanduser("~root") + "/a"),
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}2/$A1", "/scratch/me2/x y"),
        ("$TILDE/b", "/home/me/data/b"),
        ("./~/a", "./~/a"),
        ("a~", "a~"),
        ("a$", "a$"),
        ("5$/a", "5$/a"),
        ("a b %j é", "a b %j é"),
        ("docker://registry#image:tag", "docker://registry#image:tag"),
        ("0.3", "0.3"),
    ],
)
def test_what_is_filled_in(text: str, expanded: str) -> None:
    assert expand(text, ENVIRON) == expanded
    assert expand(expanded, ENVIRON) == expanded, "a recorded path means the same when it is read again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must not be empty, got ''"),
        (" ", "must not be empty"),
        ("$GONE/a", "variable GONE is not set; export it"),
        ("a/${GONE}", "variable GONE is not set"),
        ("$EMPTY/a", "variable EMPTY is empty"),
        ("$NESTED/a", "the value of NESTED, '\\$SCRATCH/a', holds a variable itself"),
        ("${SCRATCH:-/tmp}/a", "only \\$NAME, \\$\\{NAME\\} and a ~ in front"),
        ("$(date)/a", "only \\$NAME"),
        ("~nobody-here/a", "no user 'nobody-here' here; write the whole path \\(./~nobody-here"),
        ("a\nb", "'a\\\\nb' holds a line break"),
        ("a\x00b", "control character"),
        ("\ud800", "cannot be written in file names of this locale"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(text, ENVIRON)


def test_a_home_that_is_not_set() -> None:
    with pytest.raises(ValueError, match="HOME is not set"):
        expand("~/a", {"HOME": ""})


def test_a_file_of_the_very_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier version has written into a folder called ~ must not be left behind in silence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~" / "runs").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"~/runs means /home/me/runs, but .*: move .*/~/runs to /home/me/runs"):
        expand("~/runs", ENVIRON)


def test_where_a_job_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("TMPDIR", "/login/tmp")
    assert expand_for_job("$SCRATCH/a") == "/scratch/me/a"
    for name in ("TMPDIR", "SLURM_JOB_ID", "SLURM_TMPDIR", "RANK"):
        with pytest.raises(ValueError, match=f"\\${name} is the job's own"):
            expand_for_job(f"runs/${{{name}}}/a")
        assert expand_in_script(f"$SCRATCH/${name}/b") == f"/scratch/me/${name}/b"


def test_what_was_recorded_stays() -> None:
    assert as_recorded("$GONE/~\n") == "$GONE/~\n"
