"""An export that keeps its name only if it is proved to be the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.parity import Parity, check_parity
from megatron_sgt.export.parity_layers import check_parity_by_layers
from megatron_sgt.export.to_hf import Export, ExportOptions, export_checkpoint
from megatron_sgt.export.tokenizer_parity import tokenizer_checks

Mode = Literal["full", "layers", "skip"]


def failed_name(output: Path) -> Path:
    """The folder of an export that failed the comparison."""
    return output.with_name(output.name + ".failed")


def checked_export(
    load: Path,
    output: Path,
    *,
    step: int | None = None,
    options: ExportOptions | None = None,
    mode: Mode = "full",
) -> tuple[Export, Parity | None]:
    """``export_checkpoint``, then parity, whose result is written into the folder as parity.json.

    If parity fails or is interrupted, the folder is renamed to ``failed_name(output)``.

    Args:
        mode: compare whole models, layer by layer, or not at all (the result is None).

    Raises:
        CheckpointError: as ``export_checkpoint``; or an earlier failed export is in the way.
    """
    failed = failed_name(output)
    if failed.exists():
        raise CheckpointError(f"{failed} of an earlier export exists; look into its parity.json and delete it")
    export = export_checkpoint(load, output, step=step, options=options)
    if mode == "skip":
        return export, None
    try:
        parity = check_parity(export) if mode == "full" else check_parity_by_layers(export)
        parity = replace(parity, checks=(*parity.checks, *tokenizer_checks(export)))
        parity.write(output, export)
    except BaseException:
        output.rename(failed)
        raise
    if not parity.passed:
        output.rename(failed)
    return export, parity
