"""A run in a dozen lines, from its metrics file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sgt.metrics import lines, units

Record = Mapping[str, Any]


def run_summary(records: Sequence[Record], run_dir: Path, paint: lines.Paint = lines.plain) -> str:
    """Losses, growth events, restarts and paths; a run that died early lacks some of its ``records``."""
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    rows = [
        *_loss_rows(by_kind.get("train", [])),
        *_valid_rows(by_kind.get("valid", [])),
        *(("growth", lines.growth_line(event, paint).split("  ", 1)[1]) for event in by_kind.get("growth", [])),
        *(
            ("stage", lines.grow_line(event, paint).splitlines()[0].split(" ", 1)[1])
            for event in by_kind.get("grow", [])
        ),
        *_start_rows(by_kind.get("resume", [])),
        *_path_rows(by_kind.get("save", []), run_dir),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _loss_rows(train: Sequence[Record]) -> Iterator[tuple[str, str]]:
    if not train:
        yield "train", "no step was reported"
        return
    first, last = train[0], train[-1]
    total = last.get("train_iters")
    yield (
        "train",
        f"step {last['step']:,}" + (f" of {total:,}" if total else "") + f" · loss {units.fixed(first['loss'], 3)} "
        f"(step {first['step']:,}) -> {units.fixed(last['loss'], 3)}",
    )


def _valid_rows(valid: Sequence[Record]) -> Iterator[tuple[str, str]]:
    split = [v for v in valid if v.get("loss") is not None]
    if split:
        yield "validation", _curve(split[0], split[0], split[-1], split[-1])
    for name in valid[-1].get("sets") or {} if valid else {}:
        of_set = [(v, v["sets"][name]) for v in valid if name in (v.get("sets") or {})]
        yield name, _curve(*of_set[0], *of_set[-1])
    averaged = [v for v in valid if v.get("ema_loss") is not None]
    if averaged:
        last = averaged[-1]
        text = f"loss {units.fixed(last['ema_loss'], 3)} (step {last['step']:,}) of the averaged weights"
        yield "ema", f"{text} · perplexity {units.perplexity(last['ema_perplexity'])}"


def _curve(first: Record, begun: Record, last: Record, ended: Record) -> str:
    """From the values ``begun`` of the record ``first`` to those of the last."""
    pairs = ((first, begun), (last, ended))
    losses = " -> ".join(f"{units.fixed(one['loss'], 3)} (step {record['step']:,})" for record, one in pairs)
    bits = ended.get("bits_per_byte")
    per_byte = "" if bits is None else f" · {units.fixed(bits, 3)} bits/byte"
    return f"loss {losses} · perplexity {units.perplexity(ended['perplexity'])}{per_byte}"


def _start_rows(resumes: Sequence[Record]) -> Iterator[tuple[str, str]]:
    for record in resumes:
        if record.get("origin"):
            yield "began", f"with {lines.began(record['origin'])}"
    steps = [f"{r['step']:,}" for r in resumes if r.get("path") and not r.get("origin")]
    if steps:
        yield "resumed", "at step " + ", ".join(steps)


def _path_rows(saves: Sequence[Record], run_dir: Path) -> Iterator[tuple[str, str]]:
    if saves:
        yield "checkpoint", str(saves[-1]["path"])
    yield "metrics", str(run_dir / "metrics.jsonl")
    yield "config", str(run_dir / "config.yaml")
