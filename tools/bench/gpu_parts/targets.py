"""What the project wants to reach on one H100 or H200, held against what a result says."""

from __future__ import annotations

from typing import Any

ENTROPIES = "vanilla, entropies measured"
"""Name of the structure that is vanilla but for the measurement."""
OVERHEAD_PERCENT = 1.5
"""Of the 1.2B vanilla step: 3 of 24 layers, 2 heads, 1 loop."""
OVER_FLOPS = 1.3
"""Share of time over share of FLOPs."""
ATTENTION_SHARE = 0.5
"""Of the measured matmul ceiling, forward and backward of the loop's attention from two sequences on."""
ENTROPY_PERCENT = 0.2
"""Of the 1.2B vanilla step, while entropies of all its layers are measured."""
MFU_PERCENT = 45.0
"""Of the vanilla 1.2B step in bf16, against the data sheet."""


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per target; ``met`` is None where the result has no measurement of it."""
    steps = {
        row["structure"]: row
        for row in result.get("training") or []
        if row.get("model") == "1.2B" and "structure" in row
    }
    fixed, vanilla = steps.get("fixed, 1 loop", {}), steps.get("vanilla", {})
    time, flops = fixed.get("time_overhead_percent"), fixed.get("flops_overhead_percent")
    shares = [
        max(row["custom_share"], row["library_share"])
        for row in result.get("attention") or []
        if row.get("B", 0) >= 2 and "custom_share" in row
    ]
    return [
        _row(
            f"SGT step at 1.2B: at most {OVERHEAD_PERCENT} % over vanilla",
            time,
            OVERHEAD_PERCENT,
            at_most=True,
        ),
        _row(
            f"its time over its FLOPs: at most {OVER_FLOPS}",
            round(time / flops, 2) if time is not None and flops else None,
            OVER_FLOPS,
            at_most=True,
        ),
        _row(
            f"loop attention from B = 2 on: at least {ATTENTION_SHARE} of the ceiling",
            min(shares, default=None),
            ATTENTION_SHARE,
        ),
        _row(
            f"entropies at 1.2B: at most {ENTROPY_PERCENT} % of the step",
            steps.get(ENTROPIES, {}).get("time_overhead_percent"),
            ENTROPY_PERCENT,
            at_most=True,
        ),
        _row(f"vanilla step at 1.2B: at least {MFU_PERCENT} % MFU", vanilla.get("mfu_percent"), MFU_PERCENT),
    ]


def _row(target: str, measured: float | None, bound: float, at_most: bool = False) -> dict[str, Any]:
    met = None if measured is None else measured <= bound if at_most else measured >= bound
    return {"target": target, "measured": measured, "met": met}
