"""What a search for layouts has found: as JSON-able numbers, and as text of at most WIDTH columns. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.metrics.units import duration, file_size, si
from megatron_sgt.planning.advice import changed
from megatron_sgt.planning.describe import growth_line, model_line
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.planning.render import WIDTH
from megatron_sgt.planning.search import Candidate, Layout, Run, Search
from megatron_sgt.planning.step_time import NOT_CALIBRATED

_NAMES = {"compute": "products", "elementwise": "between products"}
"""Components of a step under another name than their own."""
_SMALL = 0.02
"""Shares of a step below which a component is not named."""
_SHOWN = 0.0005
"""What growth adds to a step, as a share, below which it reads 0.0 %."""


def search_numbers(found: Search) -> dict[str, Any]:
    """All that was found, JSON-able."""
    run = found.run
    return {
        "world_size": run.world_size,
        "gpus_per_node": run.machine.gpus_per_node,
        "gpu": run.machine.gpu.driver_name,
        "precision": run.precision,
        "limit": run.limit,
        "room": run.room,
        "accepted": found.accepted,
        "step_time": NOT_CALIBRATED,
        "layouts": [_numbers(one) for one in found.best],
        "excluded": None if found.excluded is None else _numbers(found.excluded),
        "configured": _configured(run),
    }


def _configured(run: Run) -> dict[str, Any]:
    """The layout that the configuration has already, whatever it is; ``refused``: why the ranks cannot have it."""
    parallel, train = run.config.parallel, run.config.train
    layout = Layout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        train.micro_batch_size,
        parallel.sequence_parallel,
        parallel.zero_stage,
        train.recompute_granularity,
    )
    try:
        configs = [changed(one.config, {"train.precision": run.precision}) for one in run.stages]
        for config in configs:
            config.num_micro_batches(run.world_size)
    except ConfigError as error:
        return {"refused": str(error)}
    alone = replace(run, cuts={})  # its cut may be another than the one that the search has made for these sizes
    return {**_numbers(Candidate(alone, layout, configs)), "overrides": []}


def _numbers(one: Candidate) -> dict[str, Any]:
    layout, config, run = one.layout, one.config, one.run
    seconds, tokens = one.whole_run()
    before = one.seconds(run.stages[0].stretches[0].plan, one.configs[0]).total
    return {
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
        "virtual": layout.virtual,
        "data_parallel": config.data_parallel_size(run.world_size),
        "pipeline_layout": str(pipeline_layout(config)),
        "zero_stage": layout.zero_stage,
        "micro_batch_size": layout.micro_batch_size,
        "accumulation": config.num_micro_batches(run.world_size),
        "recompute": layout.recompute,
        "sequence_parallel": layout.sequence_parallel,
        "step": one.time.total,
        "step_before_growth": before,
        "components": asdict(one.time),
        "tokens_per_second": tokens / seconds,
        "days": seconds / 86400,
        "peak": one.fullest.total,
        "peak_before_growth": one.peak_before_growth(),
        "pipeline_stage": one.fullest.stage,
        "in_flight": one.fullest.in_flight,
        "memory": one.fullest.rows(),
        "overrides": overrides(one),
    }


def overrides(one: Candidate) -> list[str]:
    """What to add to the command line, or to set in the file, to have this layout."""
    now = one.run.config.model_dump()
    changed = []
    for name, value in one.layout.changes().items():
        section, _, key = name.partition(".")
        if now[section][key] != value:
            changed.append(f"{name}={'null' if value is None else str(value).lower()}")
    return changed


def render_search(numbers: dict[str, Any], config: Config, title: str) -> str:
    """``numbers`` (see ``search_numbers``) of a search for ``config`` as text."""
    return "\n".join([title, *_head(numbers, config), "", *_layouts(numbers), *_excluded(numbers), *_own(numbers)])


def _head(numbers: dict[str, Any], config: Config) -> Iterator[str]:
    yield from _wrapped("model       ", model_line(config))
    yield from _wrapped("growth      ", growth_line(config))
    yield from _wrapped(
        "batch       ",
        f"{config.train.global_batch_size} sequences, {config.tokens_per_step:,} tokens per step, in every layout",
    )
    yield from _wrapped(
        "searched    ",
        f"{numbers['accepted']:,} sizes and micro-batches that the rules accept, each with the recompute and ZeRO "
        f"stage that it needs; {numbers['precision']}; fits: up to {100 * numbers['room'] / numbers['limit']:.0f} % of "
        f"the {file_size(numbers['limit'])} usable, as the memory may be off by the rest; step times are "
        f"{numbers['step_time']}",
    )


def _layouts(numbers: dict[str, Any]) -> Iterator[str]:
    if not numbers["layouts"]:
        return
    yield (
        f"{'tensor':>9}{'pipeline':>9}{'virtual':>8}{'data':>6}{'ZeRO':>6}{'micro':>7}{'recompute':>10}"
        f" {'step':>10} {'tokens/s':>10} {'run':>12} {'peak':>9}"
    )
    for place, row in enumerate(numbers["layouts"], start=1):
        yield (
            f"{place:>2}{row['tensor_parallel']:>7}{row['pipeline_parallel']:>9}{row['virtual']:>8}"
            f"{row['data_parallel']:>6}{row['zero_stage']:>6}{row['micro_batch_size']:>7}{row['recompute']:>10}"
            f" {row['step']:>8.3g} s {si(row['tokens_per_second'], ' '):>10} {_days(row['days']):>12} "
            f"{file_size(row['peak']):>9}"
        )
        for text in (_step(row), _memory(row, numbers["limit"]), _cut(row)):
            yield from _wrapped("    ", text)
        yield from _wrapped("    ", " ".join(row["overrides"]) or "as configured")


def _step(row: dict[str, Any]) -> str:
    """What its time consists of, the largest first, and what growth adds."""
    parts = {name: value / row["step"] for name, value in row["components"].items() if isinstance(value, float)}
    named = sorted(((share, name) for name, share in parts.items() if share >= _SMALL), reverse=True)
    shares = ", ".join(f"{_NAMES.get(name, name.replace('_', ' '))} {100 * share:.0f} %" for share, name in named)
    more = row["step"] / row["step_before_growth"] - 1
    growth = f"; growth makes it {100 * more:+.1f} % longer" if abs(more) >= _SHOWN else ""
    return f"step: {shares}{growth}"


def _memory(row: dict[str, Any], limit: float) -> str:
    """How full the fullest rank is, and what growth adds."""
    where = ""
    if row["pipeline_parallel"] > 1:
        unit = "chunks" if row["virtual"] > 1 else "micro-batches"
        where = f" on pipeline stage {row['pipeline_stage']} ({row['in_flight']} {unit} in flight)"
    grown = row["peak"] - row["peak_before_growth"]
    return (
        f"memory: {100 * row['peak'] / limit:.0f} % of {file_size(limit)}{where}; growth adds {file_size(grown)}; "
        f"{_largest(row)}"
    )


def _largest(row: dict[str, Any]) -> str:
    state = sum(row["memory"][name] for name in ("weights", "gradients", "optimizer"))
    return f"weights, gradients, optimizer {100 * state / row['peak']:.0f} %"


def _cut(row: dict[str, Any]) -> str:
    return f"layers: {row['pipeline_layout'].replace(',', ' ')}" if row["pipeline_parallel"] > 1 else ""


def _excluded(numbers: dict[str, Any]) -> Iterator[str]:
    row, limit = numbers["excluded"], numbers["limit"]
    if row is None:
        return
    after = row["peak_before_growth"] <= numbers["room"]
    when = f"only after growth ({file_size(row['peak_before_growth'])} before it)" if after else "from the start"
    needs = f"{_memory(row, limit)}; {' '.join(row['overrides']) or 'as configured'}"
    yield ""
    if not numbers["layouts"]:
        yield from _wrapped(
            "", f"no layout fits; the one that needs least needs {file_size(row['peak'])}, {when}. {needs}"
        )
        return
    gain = numbers["layouts"][0]["step"] / row["step"] - 1
    yield from _wrapped(
        "",
        f"does not fit: {file_size(row['peak'])}, {when}, where a step would take {row['step']:.3g} s "
        f"({100 * gain:.1f} % faster than the first). {needs}",
    )


def _own(numbers: dict[str, Any]) -> list[str]:
    """The layout of the file, and how much longer its step takes than that of the first one."""
    row, label = numbers["configured"], "this file's layout: "
    if "refused" in row:
        return ["", *_wrapped("", f"{label}not on {numbers['world_size']} GPUs: {row['refused'].partition('; ')[0]}")]
    sizes = [f"TP {row['tensor_parallel']}", f"PP {row['pipeline_parallel']}", f"DP {row['data_parallel']}"]
    if row["virtual"] > 1:
        sizes[1] += f" x {row['virtual']} chunks"
    beside = ""
    if numbers["layouts"]:
        beside = f" ({100 * (row['step'] / numbers['layouts'][0]['step'] - 1):+.0f} %)"
    fits = "" if row["peak"] <= numbers["limit"] else ", which does not fit"
    how = f"ZeRO {row['zero_stage']}, micro {row['micro_batch_size']}, recompute {row['recompute']}"
    text = f"{label}{' x '.join(sizes)}, {how}: {row['step']:.3g} s{beside}, {file_size(row['peak'])}{fits}"
    return ["", *_wrapped("", text)]


def _days(days: float) -> str:
    return f"{days:,.{int(days < 1000)}f} days" if days >= 10 else duration(86400 * days)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * max(4, len(label)), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
