"""Readable tables of a result, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One table; columns in the order in which they first occur. Values that were not measured are a dash."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:g}" if isinstance(value, float) else str(value)


TITLES = (
    "targets",
    "ceilings",
    "correctness",
    "training",
    "attention",
    "entropy",
    "operations",
    "passes",
    "runs",
)


def markdown(result: dict[str, Any]) -> str:
    """The whole result, as far as it goes."""
    about = result["about"]
    sources = f"commit {about.get('commit')}, sources {about.get('sources')}"
    lines = [f"# {about.get('device')}, {about.get('dtype')}, {sources}", ""]
    if about.get("dry_run"):
        lines += ["A dry run: every branch was executed on a CPU, in tiny shapes. It measures nothing.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()), ""]
    for note in result.get("rows", []):
        if note["error"]:
            lines += [f"**{note['row']}:** {note['error']}", ""]
    for title in TITLES:
        rows = result.get(title) or []
        plain = [row for row in rows if "skipped" not in row and "profile" not in row]
        lines += [f"## {title}", "", table(plain) if plain else "nothing measured", ""]
        lines += [f"- skipped: {row.get('model', '')} {row['skipped']}" for row in rows if "skipped" in row]
        for row in rows:
            if "profile" in row:
                lines += ["", f"### top kernels, {row['model']}", "", table(row["profile"]), ""]
    return "\n".join(lines) + "\n"
