"""Paths as people write them: ``~``, ``~user``, ``$NAME`` and ``${NAME}`` are filled in, or refused. No torch.

A shell leaves ``~`` alone behind ``=``, and nobody fills in a variable inside a YAML file: what was not filled in here
would become a folder called ``~`` or ``$SCRATCH`` in the current one. A path without these signs stays as it is, and so
does one that was filled in before: what a run records means the same when it is read again.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\}|(?P<command>\())")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What a job is given by Slurm, or by the node that it runs on.
_OF_THE_JOB = re.compile(r"SLURM\w*|TMPDIR|RANK|WORLD_SIZE|LOCAL_RANK|HOSTNAME")


def expand(text: str, environ: Mapping[str, str] | None = None, keep: re.Pattern[str] | None = None) -> str:
    """``text`` with ``~`` and variables filled in from ``environ`` (default: os.environ).

    keep: names of variables that are left for somebody else to fill in.

    Raises:
        ValueError: it is empty, holds a control character or what the locale cannot write, names a variable that is
            not set or a user who is not there, or is the very name of something here. The message has the fix.
    """
    environ = os.environ if environ is None else environ
    if not text.strip():
        raise ValueError(f"must not be empty, got {text!r}")
    expanded = _VARIABLE.sub(lambda match: _value(match, environ, keep), text)
    if expanded.startswith("~"):
        expanded = _with_home(expanded, environ)
    if _CONTROL.search(expanded):
        raise ValueError(f"{expanded!r} holds a line break or another control character; rename it")
    try:
        os.fsencode(expanded)
    except UnicodeEncodeError:
        raise ValueError(
            f"{text!a} cannot be written in file names of this locale ({sys.getfilesystemencoding()}); "
            "choose one of UTF-8: export LC_ALL=C.UTF-8"
        ) from None
    if expanded != text and os.path.lexists(text):
        raise ValueError(
            f"{text} means {expanded}, but something of that very name is here too: move {os.path.abspath(text)} to "
            f"{expanded}, or give it another name"
        )
    return expanded


def expand_for_job(text: str) -> str:
    """As ``expand``, where a job is submitted: variables that differ in the job are refused.

    Raises:
        ValueError: as ``expand``, or for a variable of the job's own.
    """
    for match in _VARIABLE.finditer(text):
        name = match["name"] or match["braced"] or ""
        if _OF_THE_JOB.fullmatch(name):
            raise ValueError(
                f"{text}: ${name} is the job's own and differs from what it is here, where the job is submitted; write "
                "a path that is the same in both places"
            )
    return expand(text)


def expand_in_script(text: str) -> str:
    """As ``expand``, for a place in a job's script where the shell fills in what is the job's own.

    Raises:
        ValueError: as ``expand``.
    """
    return expand(text, keep=_OF_THE_JOB)


def as_recorded(text: str) -> str:
    """``text``: the paths in a finished run's files are no longer to be filled in or refused."""
    return text


def _value(match: re.Match[str], environ: Mapping[str, str], keep: re.Pattern[str] | None) -> str:
    name, text = match["name"] or match["braced"] or "", match.string
    if keep is not None and keep.fullmatch(name):
        return match[0]
    if match["command"] or not _NAME.fullmatch(name):
        raise ValueError(f"{text!r}: only $NAME, ${{NAME}} and a ~ in front are filled in; write the path itself")
    value = environ.get(name, "")
    if not value:
        state = "empty" if name in environ else "not set"
        raise ValueError(f"{text!r}: the environment variable {name} is {state}; export it, or write the path itself")
    if _VARIABLE.search(value):
        raise ValueError(f"{text!r}: the value of {name}, {value!r}, holds a variable itself; export the path itself")
    return value


def _with_home(text: str, environ: Mapping[str, str]) -> str:
    user, slash, rest = text.partition("/")
    home = environ.get("HOME", "") if user == "~" and "HOME" in environ else os.path.expanduser(user)
    if not home or home.startswith("~"):
        who = "HOME is not set" if user == "~" else f"there is no user {user[1:]!r} here"
        raise ValueError(f"{text!r}: {who}; write the whole path (./{user} for what is really called so)")
    return (home.rstrip("/") + slash + rest) or "/"
