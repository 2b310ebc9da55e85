"""The console lines of one run, as pure functions of a record: (record, paint) -> text without a newline.

``paint(role, text)`` colours a part; the roles are those of ROLES. The records' fields are in records.py; a field that
is absent or None is left out of the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from megatron_sgt.errors import ExitCode
from megatron_sgt.metrics import units

Paint = Callable[[str, str], str]
Record = Mapping[str, Any]

ROLES = ("bad", "warn", "event", "good")


def plain(role: str, text: str) -> str:
    """The paint of a log file: none."""
    return text


def _join(parts: Iterable[str | None]) -> str:
    return "  ".join(part for part in parts if part)


def _part(record: Record, key: str, text: Callable[[Any], str]) -> str | None:
    value = record.get(key)
    return None if value is None else text(value)


def _number(record: Record, key: str, label: str, decimals: int, paint: Paint) -> str | None:
    value = record.get(key)
    text = f"{label} {units.fixed(value, decimals)}"
    if units.is_bad(value):
        return paint("bad", text)
    return None if value is None else text


def _memory(record: Record) -> str | None:
    used, total = record.get("memory_gb"), record.get("memory_total_gb")
    if used is None:
        return None
    return f"{used:.1f} GB" if total is None else f"{used:.1f}/{total:.0f} GB"


def _per_device(record: Record) -> str | None:
    rate = record.get("tokens_per_second_per_device")
    if rate is None or rate == record.get("tokens_per_second"):
        return None
    return f"{units.si(rate)}/{'gpu' if record.get('device') == 'gpu' else 'rank'}"


def train_line(record: Record, paint: Paint = plain) -> str:
    """Step, loss, gradient norm, learning rate, speed, memory and time left.

    ``MFU n/a`` appears where a speed is known and a peak is not; a loss or norm that is no finite number is
    painted "bad"; skipped steps appear when there were any.
    """
    step, total = record["step"], record.get("train_iters")
    position = f"step {step:,}"
    if total:
        position = f"step {step:>{len(f'{total:,}')},}/{total:,}  {100 * step / total:4.1f}%"
    mfu = record.get("mfu")
    skipped = record.get("skipped_steps") or 0
    return _join(
        (
            position,
            _number(record, "loss", "loss", 3, paint),
            _number(record, "grad_norm", "gn", 2, paint),
            _part(record, "lr", lambda lr: f"lr {units.exponent(lr)}"),
            _part(record, "seq_length", lambda length: f"T {length:,}"),
            _part(record, "tokens_per_second", lambda rate: f"{units.si(rate, ' ')} tok/s"),
            _per_device(record),
            _part(record, "tflops_per_device", units.flop_rate),
            _part(record, "tflops_per_device", lambda _: f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"),
            _memory(record),
            _part(record, "eta_s", lambda seconds: f"eta {units.duration(seconds)}"),
            paint("warn", f"skipped {skipped}") if skipped else None,
        )
    )


def _heads_of(record: Record, layer: int) -> str:
    kept = record.get("kept_heads") or {}
    heads = kept.get(layer, kept.get(str(layer), ()))
    return f"[{','.join(str(head) for head in heads)}]"


def _structure(record: Record) -> str:
    """Every looped layer with its kept heads, deepest first: 19[4,11] 14[2,9]; depth > 1 as 19[4,11]x2."""
    depths = record.get("loop_depth") or ()
    looped = [(layer, depth) for layer, depth in enumerate(depths) if depth]
    return " ".join(
        f"{layer}{_heads_of(record, layer)}" + (f"x{depth}" if depth > 1 else "") for layer, depth in reversed(looped)
    )


def _selected(record: Record) -> str:
    layer, score = record["layer"], record.get("layer_score")
    rank, candidates = record.get("layer_rank"), record.get("num_candidates")
    details = [] if score is None else [f"score {score:.2f}"]
    if rank is not None:
        details.append(f"rank {rank}" + (f" of {candidates}" if candidates is not None else ""))
    return f"layer {layer} selected" + (f" ({', '.join(details)})" if details else "")


def growth_line(record: Record, paint: Paint = plain) -> str:
    """One decision of the schedule; it stands out, because it changes what the run computes."""
    action, layer = record["action"], record.get("layer")
    overhead = _part(record, "flops_overhead", lambda part: f"{100 * part:+.1f} % FLOPs")
    depths = record.get("loop_depth") or ()
    chosen = sum(1 for depth in depths if depth)
    most = record.get("max_selected_layers")
    parts: list[str | None] = [f"step {record['step']:,}"]
    if action == "fixed":
        parts += [f"structure fixed: {_structure(record) or 'no layer loops'}", overhead]
    elif layer is None:
        parts += [action.replace("_", " "), overhead]
    else:
        fade = _part(record, "fade_until_step", lambda s: f"gates of the others fade until {s:,}")
        deeper = action == "increase_depth"
        parts += [
            f"layer {layer} loops once more" if deeper else _selected(record),
            f"keep heads {_heads_of(record, layer)}",
            None if deeper else fade,
            f"depth {depths[layer]}" if depths else None,
            overhead,
            f"{chosen}/{most} layers" if most else None,
        ]
    return paint("event", "GROW") + "  " + _join(parts)


def length_line(record: Record, paint: Paint = plain) -> str:
    """A step of the curriculum of sequence lengths."""
    return _join(
        (
            f"{paint('event', 'LENGTH')}  step {record['step']:,}",
            f"T {record['previous_seq_length']:,} -> {record['seq_length']:,}",
            f"{record['sequences_per_step']:,} sequences a step",
            f"{units.si(record['model_flops_per_step'], ' ')}FLOP a step",
        )
    )


def phase_line(record: Record, paint: Paint = plain) -> str:
    """The phase that the next step belongs to."""
    return _join(
        (
            f"{paint('event', 'PHASE')}  step {record['step']:,}",
            f"{record['name']} ({record['number']}), steps {record['first_step']:,} to {record['last_step']:,}",
            *record["settings"],
        )
    )


def grow_line(record: Record, paint: Paint = plain) -> str:
    """A new stage: how the model has become larger, and what that did to the loss; one line more for each note."""
    before, after = record.get("sizes_before") or {}, record.get("sizes_after") or {}
    grown = [f"{name} {before[name]:,} -> {size:,}" for name, size in after.items() if before.get(name) != size]
    parameters = [units.si(record[f"parameters_{when}"], " ") for when in ("before", "after")]
    more = record["flops_per_token_after"] / record["flops_per_token_before"] - 1
    losses = [units.fixed(record.get(f"probe_loss_{when}"), 3) for when in ("before", "after")]
    line = _join(
        (
            f"{paint('event', 'STAGE')} step {record['step']:,}",
            f"stage {record['stage']} begins: {record['operator']}",
            ", ".join(grown),
            f"{' -> '.join(parameters)} parameters",
            f"{100 * more:+.1f} % FLOPs",
            f"loss {losses[1]}" if record.get("probe_loss_before") is None else f"loss {' -> '.join(losses)}",
            None if record["lr_policy"] == "continue" else f"lr {record['lr_policy']}",
            _part(record, "seconds", lambda seconds: f"({units.elapsed(seconds)})"),
        )
    )
    return "\n".join([line, *(f"{paint('warn', 'NOTE')}  {note}" for note in record.get("notes") or ())])


def valid_line(record: Record, paint: Paint = plain) -> str:
    """Validation loss, perplexity and bits per byte, also of the averaged weights; one line more for each named set."""
    batches, seconds = record.get("batches"), record.get("seconds")
    extent = [] if batches is None else [f"{batches:,} batches"]
    extent += [] if seconds is None else [units.elapsed(seconds)]
    whole = _join(
        (
            f"{paint('good', 'VALID')} step {record['step']:,}",
            *_loss_parts(record, paint),
            f"({', '.join(extent)})" if extent else None,
        )
    )
    return "\n".join([whole, *(_set_line(name, one, paint) for name, one in (record.get("sets") or {}).items())])


def _loss_parts(record: Record, paint: Paint) -> Iterator[str | None]:
    for prefix, label in (("", ""), ("ema_", "ema ")):
        yield _number(record, f"{prefix}loss", f"{label}loss", 3, paint)
        perplexity = record.get(f"{prefix}perplexity")
        yield None if perplexity is None else f"{label}ppl {units.perplexity(perplexity)}"
        yield _number(record, f"{prefix}bits_per_byte", f"{label}bits/byte", 3, paint)


def _set_line(name: str, record: Record, paint: Paint) -> str:
    """One set of data.valid, below the line of the validation."""
    samples, size = record.get("samples"), record.get("samples_in_set")
    part = "all" if samples == size else f"{samples:,} of"
    return _join((f"      {name}", *_loss_parts(record, paint), None if size is None else f"({part} {size:,} samples)"))


def tasks_line(record: Record, paint: Paint = plain) -> str:
    """The measured values of each task, or why there are none."""
    label = f"{paint('good', 'TASKS')} step {record['step']:,}"
    if record.get("failed"):
        return _join((label, paint("bad", "not measured"), str(record["failed"])))
    parts = (
        ", ".join((task, *(f"{name} {units.significant(value)}" for name, value in values.items())))
        for task, values in record["results"].items()
    )
    return _join((label, *parts, _part(record, "seconds", lambda seconds: f"({units.elapsed(seconds)})")))


def save_line(record: Record, paint: Paint = plain) -> str:
    """A checkpoint that is complete on disk."""
    size = _part(record, "bytes", units.file_size)
    seconds = _part(record, "seconds", units.elapsed)
    cost = f"{size} in {seconds}" if size and seconds else size or seconds
    path = _part(record, "path", str)
    asked = "as asked" if record.get("asked") else None
    return _join((f"{paint('good', 'SAVE')}  step {record['step']:,}", asked, cost, path))


def began(origin: Mapping[str, Any]) -> str:
    """With whose weights a new run began (checkpoint/new_run.py)."""
    which = "the averaged weights" if origin["weights"] == "ema" else "the weights"
    loops = "loops kept" if origin["growth"] == "keep" else "growth anew"
    return f"{which} of {origin['checkpoint']} (step {origin['step']:,}, {origin['tokens']:,} tokens), {loops}"


def resume_line(record: Record, paint: Paint = plain) -> str:
    """From where the run starts: a checkpoint, or from nothing; one line more for each that was passed over."""
    if record.get("path") is None:
        searched = record.get("searched")
        looked = f" (no checkpoint in {searched})" if searched else ""
        return f"{paint('good', 'START')}  fresh start{looked}"
    changed = _part(record, "changed", lambda names: f"changed: {'; '.join(names)}" if names else "")
    if (origin := record.get("origin")) is not None:
        return _join((f"{paint('good', 'START')}  new run with {began(origin)}", changed))
    tokens = _part(record, "consumed_tokens", lambda n: f"({n:,} tokens consumed)")
    resumed = _join(
        (
            f"{paint('warn', 'RESUME')}  resumed at step {record['step']:,}",
            f"from {record['path']}",
            tokens,
            changed,
        )
    )
    return "\n".join([*(f"{paint('bad', 'SKIP')}  {why}" for why in record.get("skipped") or ()), resumed])


def data_line(record: Record, paint: Paint = plain) -> str:
    """What another order of the data means for the run that goes on."""
    return f"{paint('warn', 'DATA')}  {record['line']}"


def save_failed_line(record: Record, paint: Paint = plain) -> str:
    """A checkpoint that could not be written; training continues."""
    return f"{paint('bad', 'NOT SAVED')}  step {record['step']:,}  {record['reason']}"


def rollback_line(record: Record, paint: Paint = plain) -> str:
    """A loss spike, and what came of it."""
    spike = (
        f"loss {units.fixed(record['loss'], 3)} of step {record['spike_step']:,} is above "
        f"{units.fixed(record['limit'], 3)}"
    )
    if record.get("path") is None:
        return f"{paint('warn', 'SPIKE')}  {spike}; no checkpoint to go back to, training goes on"
    return (
        f"{paint('warn', 'ROLLBACK')}  {spike}; back to step {record['step']:,}, "
        f"{record['passed_samples']:,} samples passed over"
    )


def ranks_line(record: Record, paint: Paint = plain) -> str:
    """The rank that the others wait for; nothing while there is none."""
    if record.get("lagging_rank") is None:
        return ""
    base = "of a step longer" if record["what"] == "waiting for data" else "longer"
    return (
        f"{paint('warn', 'SLOW')}  step {record['step']:,}  rank {record['lagging_rank']} on {record['host']}: "
        f"{record['what']} {record['excess']:.0%} {base} than the median rank"
    )


def stop_line(record: Record, paint: Paint = plain) -> str:
    """A request to stop that all ranks obey."""
    return f"{paint('warn', 'STOP')}  step {record['step']:,}  {record['reason']}: saving, then leaving"


def hook_line(record: Record, paint: Paint = plain) -> str:
    """What a user's hook reports."""
    values = (f"{name} {units.significant(value)}" for name, value in record["values"].items())
    return _join((f"{paint('good', 'HOOK')}  step {record['step']:,}", record["hook"], *values))


def _losses_of_sets(record: Record) -> Mapping[str, float]:
    return record.get("valid_losses") or {}


def summary_line(record: Record, paint: Paint = plain) -> str:
    """The end of a run: one line of results, then one line for each of its ``paths``."""
    step, total = record["step"], record.get("train_iters")
    first = _part(record, "first_loss", lambda loss: f"{units.fixed(loss, 3)} -> ")
    loss = _number(record, "loss", "loss", 3, plain)
    if loss and first:
        loss = loss.replace("loss ", f"loss {first}", 1)
    if loss and units.is_bad(record["loss"]):
        loss = paint("bad", loss)
    label = paint("warn", "SAVED") if record.get("exit_code") == ExitCode.SAVED else paint("good", "DONE")
    lines = [
        _join(
            (
                f"{label}  step {step:,}" + (f"/{total:,}" if total else ""),
                _part(record, "reason", str),
                loss,
                _number(record, "valid_loss", "valid loss", 3, paint),
                _number(record, "valid_ema_loss", "ema valid loss", 3, paint),
                *(_number({name: loss}, name, name, 3, paint) for name, loss in _losses_of_sets(record).items()),
                _part(record, "growth_events", lambda n: f"{n} growth event{'' if n == 1 else 's'}"),
                _part(record, "consumed_tokens", lambda n: f"{units.si(n, ' ')} tokens"),
                _part(record, "tokens_per_second", lambda rate: f"{units.si(rate, ' ')} tok/s"),
                _part(record, "seconds", lambda seconds: f"in {units.elapsed(seconds)}"),
            )
        )
    ]
    paths = record.get("paths") or {}
    width = max((len(name) for name in paths), default=0)
    lines += [f"      {name:<{width}}  {path}" for name, path in paths.items()]
    return "\n".join(lines)
