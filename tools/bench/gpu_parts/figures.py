"""What leaves the suite: results as files, without figures where nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_parts.report import markdown
from megatron_sgt.files import replace_text

DRY_FIGURE = "dry"


def write(result: dict[str, Any], file: Path) -> None:
    """The result as ``file`` (JSON) and as Markdown beside it, each replaced in one step: a kill leaves the last."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (file, json.dumps(result, indent=1) + "\n"),
        (file.with_suffix(".md"), markdown(result)),
    ):
        replace_text(path, text)


def without_figures(value: Any) -> Any:
    """A copy of a result in which every figure that was measured (a float) is the word "dry", and no target is met."""
    if isinstance(value, dict):
        return {name: None if name == "met" else without_figures(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_figures(inner) for inner in value]
    return DRY_FIGURE if isinstance(value, float) else value
