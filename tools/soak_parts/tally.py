"""What happened, and the table of it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from soak_parts.faults import FAULTS


@dataclass
class Tally:
    """What happened on one layout."""

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


def table(tallies: dict[str, Tally]) -> str:
    """Rows of faults, columns of layouts: how often each came, and in brackets how many ended in a death."""
    lines = [("", *tallies)]
    for kind in FAULTS:
        lines.append((kind, *(f"{t.faults[kind]} ({t.deaths[kind]})" for t in tallies.values())))
    rows: dict[str, Callable[[Tally], str]] = {
        "deaths": lambda t: str(t.deaths.total()),
        "of them inside a save": lambda t: str(t.inside),
        "checkpoints saved": lambda t: str(t.saves),
        "saves that found the disk full": lambda t: str(t.refused_saves),
        "checkpoints lost": lambda t: str(t.lost_checkpoints),
        "steps equal to the reference": lambda t: f"{t.checked_steps:,}",
        "lost steps per death, mean": lambda t: f"{sum(t.lost_steps) / max(1, len(t.lost_steps)):.1f}",
        "lost steps per death, most": lambda t: str(max(t.lost_steps, default=0)),
        "ETTR": lambda t: f"{t.useful_s / t.wall_s:.2f}" if t.wall_s else "-",
        "minutes": lambda t: f"{t.wall_s / 60:.1f}",
    }
    lines += [(row, *(show(t) for t in tallies.values())) for row, show in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ("---",) * len(lines[0]), *lines[1:]])
