"""Writes docs/gpu-status.md from branches.yaml, from the sources and from the results of the GPU suite.

python -m tests.gpu.status
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.gpu.branches import ROOT, places

TABLE = Path(__file__).with_name("branches.yaml")
PAGE = ROOT / "docs" / "gpu-status.md"
RESULTS = ROOT / "benchmarks" / "results"
HOW = {
    "emulated": "torch.cuda, a library or a device's module is pretended",
    "interpreted": "the same code, on Triton's interpreter",
    "compiled": "on Triton's interpreter, and compiled ahead of time for every supported GPU",
    "same": "the same code on a CPU: it differs by a value, or is called by itself",
    "never": "nothing executes it on a CPU",
}
SEVERAL = (
    "stages of a pipeline on GPUs of their own: Megatron-Core's schedules, batched and overlapped messages over NCCL, "
    "outputs freed while they are sent, the borrowed weight of tied embeddings, fp16 (refused with a pipeline)",
)
"""What one GPU cannot show: NCCL refuses two ranks on one. CPUs run it over gloo."""
HEAD = """# What has run on a GPU, and what has not

Written by `python -m tests.gpu.status`; a test holds it to the sources: every function that asks which device it runs
on, and every file of Triton kernels, stands here with the test that executes its GPU branch on a CPU. The last column
is filled by the results of `tools/bench/gpu_suite.py` in `benchmarks/results/`.

**{summary}** On a CPU: {counts}

| how | |
| --- | --- |
{how}

| place | what it does on a GPU alone | on a CPU | by | on a GPU |
| --- | --- | --- | --- | --- |
"""


def table() -> dict[str, dict[str, str]]:
    """By place: what, how, by, and the part of the suite that runs it, if one does."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def ran(results: Path = RESULTS) -> dict[str, str]:
    """By part of the suite: the device and the day of the newest result in which a row of it went through."""
    parts: dict[str, str] = {}
    for file in sorted(results.glob("*.json"), key=lambda f: f.stem[-17:]):
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for row in result["rows"]:
            if row["error"] is None:
                parts[row["part"]] = f"{result['about']['device']}, {file.stem[-17:-7]}"
    return parts


def summary(results: Path = RESULTS) -> str:
    """One sentence, which the README shows too."""
    on_gpu, rows = ran(results), table().values()
    reached = sum(row.get("part") in on_gpu for row in rows)
    if not reached:
        return "Nothing here has run on a GPU yet."
    return f"Of {len(rows)} branches that only a GPU executes, {reached} have run on one."


def page(results: Path = RESULTS) -> str:
    """The text of docs/gpu-status.md."""
    rows, on_gpu = table(), ran(results)
    counts = Counter(row["how"] for row in rows.values())
    told = ", ".join(f"{counts[how]} {how}" for how in HOW)
    text = HEAD.format(
        counts=f"{told}.",
        summary=summary(results),
        how="\n".join(f"| {how} | {meaning} |" for how, meaning in HOW.items()),
    )
    for place in places():
        row = rows[place]
        by = f"`{row['by']}`" if row["by"].startswith("tests/") else row["by"]
        where = on_gpu.get(row.get("part", ""), "never")
        text += f"| `{place.removeprefix('megatron_sgt/')}` | {row['what']} | {row['how']} | {by} | {where} |\n"
    return f"{text}\nNever run on a GPU, as one is not enough:\n\n" + "".join(f"- {what}\n" for what in SEVERAL)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
