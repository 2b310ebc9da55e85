"""What happened, and the tables of it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from soak_parts.faults import FAULTS


@dataclass
class Tally:
    """What happened on one layout with one kind of saves."""

    faults: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    inside: int = 0
    """Deaths that left an unfinished save behind."""
    lost_steps: list[int] = field(default_factory=list)
    """Steps done and not saved, per death."""
    saves: int = 0
    refused_saves: int = 0
    lost_checkpoints: int = 0
    checked_steps: int = 0
    useful_s: float = 0.0
    wall_s: float = 0.0


def total(tallies: Iterable[Tally]) -> Tally:
    """All of them as one."""
    result = Tally()
    for tally in tallies:
        for entry in fields(Tally):
            setattr(result, entry.name, getattr(result, entry.name) + getattr(tally, entry.name))
    return result


Tallies = Mapping[str, Mapping[str, Tally]]
"""By layout and kind of saves."""

_MEASURES: dict[str, Callable[[Tally], str]] = {
    "deaths": lambda t: str(t.deaths.total()),
    "of them inside a save": lambda t: str(t.inside),
    "checkpoints saved": lambda t: str(t.saves),
    "refused: disk full": lambda t: str(t.refused_saves),
    "lost": lambda t: str(t.lost_checkpoints),
    "steps equal to the reference": lambda t: f"{t.checked_steps:,}",
    "lost steps per death": lambda t: f"{sum(t.lost_steps) / max(1, len(t.lost_steps)):.1f}",
    "most": lambda t: str(max(t.lost_steps, default=0)),
    "ETTR": lambda t: f"{t.useful_s / t.wall_s:.2f}" if t.wall_s else "-",
    "minutes": lambda t: f"{t.wall_s / 60:.1f}",
}


def tables(tallies: Tallies) -> str:
    """How often each fault came, and in brackets how many ended in a death; then what every layout has gone through."""
    kinds = list(dict.fromkeys(saves for by_saves in tallies.values() for saves in by_saves))
    by_kind = [total(by_saves[saves] for by_saves in tallies.values() if saves in by_saves) for saves in kinds]
    faults = [(kind, *(f"{t.faults[kind]} ({t.deaths[kind]})" for t in by_kind)) for kind in FAULTS]
    cells = {f"{name} {saves}": t for name, by_saves in tallies.items() for saves, t in by_saves.items()}
    if len(cells) > 1:
        cells["all"] = total(cells.values())
    rows = [(name, *(show(t) for show in _MEASURES.values())) for name, t in cells.items()]
    return f"{_table(('saves', *kinds), faults)}\n\n{_table(('layout, saves', *_MEASURES), rows)}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *rows])
