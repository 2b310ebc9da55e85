"""How policies are written: a name, or a name with a number in brackets. No torch."""

from __future__ import annotations

import re

_FORM = re.compile(r"([a-z]+)(?:\((\d{1,10})\))?")


def name_and_number(text: str) -> tuple[str, int | None]:
    """("rewind", 20) of "rewind(20)", ("continue", None) of "continue"; ("", None) of what is no policy at all."""
    match = _FORM.fullmatch(text.replace(" ", ""))
    if match is None:
        return "", None
    name, digits = match.groups()
    return name, None if digits is None else int(digits)
