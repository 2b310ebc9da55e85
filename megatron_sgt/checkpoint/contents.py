"""What checkpoints hold, and whether they are whole: read from their small files, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import LAYOUT_FREE, read_config, read_state
from megatron_sgt.checkpoint.surgery.state import GROW
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.data.ledger import Progress, ledger_from_json, recorded_tokens
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import resumed_schedule

Status = Literal["complete", "damaged", "unfinished"]
Check = Callable[[Path], list[str]]
"""Names the files of a committed checkpoint that are missing, short or changed."""

_PREFIX = layout.tag_for(0).removesuffix("0")


@dataclass(frozen=True)
class LoopingLayer:
    """A layer that loops; without kept heads the whole layer is executed again."""

    layer: int
    depth: int
    kept_heads: tuple[int, ...]
    selected_at: int | None
    other_gate: float


@dataclass(frozen=True)
class GrowthContents:
    """Where growth stood; ``layers`` in the order of their selection, ``window_end`` while a window runs.

    ``plan``: what the model executed, with the gates of the saved step.
    """

    method: str
    phase: str
    layers: tuple[LoopingLayer, ...]
    window_end: int | None
    plan: LoopPlan


@dataclass(frozen=True)
class Details:
    """What the small files say. ``layout``: None where any layout can read it; ``origin``: of an import.

    ``ema_decay``: of the average of the weights that it holds; None without one. ``stages``: how each stage of its run
    but the first began, up to its own (stages/stages.py). ``grown``: after which steps, and by which operators, its
    model became deeper or wider, in its run or before. ``began``: with whose weights its run began (new_run.py).
    ``sources``: of its data, as far as it says what it has read.
    """

    step: int
    train_iters: int
    samples: int
    tokens: int
    skipped_steps: int
    layout: dict[str, Any] | None
    origin: str | None
    model: ModelConfig
    parameters: int
    growth: GrowthContents
    ema_decay: float | None = None
    stages: tuple[dict[str, Any], ...] = ()
    grown: tuple[tuple[int, str], ...] = ()
    sources: dict[str, Progress] = field(default_factory=dict)
    began: dict[str, Any] | None = None


@dataclass(frozen=True)
class Contents:
    """One folder. ``problems`` is empty when it is complete; ``details`` is None where they cannot be read.

    ``saved_at``: seconds since 1970, None when it was never finished. ``copy``: whether it is the layout-free
    copy that a run made of the checkpoint beside it.
    """

    folder: Path
    status: Status
    problems: tuple[str, ...]
    num_files: int
    num_bytes: int
    saved_at: float | None
    is_latest: bool
    copy: bool
    details: Details | None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self) | {"folder": str(self.folder)}
        if self.details is not None:
            values["details"]["model"] = self.details.model.model_dump(mode="json")
            values["details"]["growth"]["plan"] = self.details.growth.plan.to_dict()
        return values


@dataclass(frozen=True)
class RootContents:
    """A folder of checkpoints, oldest first. ``problem``: why nothing could resume from it; None if it can."""

    root: Path
    latest: str | None
    problem: str | None
    checkpoints: tuple[Contents, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "root": str(self.root),
            "latest": self.latest,
            "problem": self.problem,
            "checkpoints": [contents.to_dict() for contents in self.checkpoints],
        }


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is one checkpoint, whole or not, and not a folder of them."""
    names = (layout.MANIFEST_FILE, layout.STATE_FILE)
    return path.is_dir() and (path.name.startswith(_PREFIX) or any((path / name).is_file() for name in names))


def read_contents(folder: Path, check: Check, is_latest: bool = False) -> Contents:
    """Look into one checkpoint folder, finished or not."""
    files = layout.file_sizes(folder)
    manifest = folder / layout.MANIFEST_FILE
    if folder.suffix == layout.TEMPORARY_SUFFIX or not manifest.is_file():
        status: Status = "unfinished"
        problems = [f"a save that was not finished: there is no {layout.MANIFEST_FILE}; it is never loaded"]
        saved_at = None
    else:
        problems, saved_at = _guarded(check, folder), manifest.stat().st_mtime
        status = "damaged" if problems else "complete"
    details = None
    try:
        details = _details(folder)
    except SGTError as error:
        if status != "unfinished":
            status, problems = "damaged", [*problems, str(error)]
    return Contents(
        folder=folder,
        status=status,
        problems=tuple(dict.fromkeys(problems)),
        num_files=len(files),
        num_bytes=sum(files.values()),
        saved_at=saved_at,
        is_latest=is_latest,
        copy=folder.suffix == layout.COPY_SUFFIX,
        details=details,
    )


def read_root(root: Path, check: Check) -> RootContents:
    """Look into every folder of ``root`` that is or was to be a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    folders = sorted(
        (path for path in root.glob(f"{_PREFIX}*") if path.is_dir()),
        key=lambda path: (layout.step_of(path.name.split(".")[0]), path.name),
    )
    if not folders:
        layout.resolve(root)  # says what is there instead
        raise CheckpointError(f"no checkpoint at {root}")
    latest, problem = None, None
    try:
        latest = layout.latest_tag(root)
    except CheckpointError as error:
        problem = str(error)
    if latest is None and problem is None:
        problem = f"{root} holds no finished checkpoint"
    contents = tuple(read_contents(folder, check, folder.name == latest) for folder in folders)
    return RootContents(root, latest, problem, contents)


def _guarded(check: Check, folder: Path) -> list[str]:
    try:
        return check(folder)
    except (KeyError, TypeError, AttributeError) as error:
        return [f"{layout.MANIFEST_FILE} is damaged: {error!r}"]
    except SGTError as error:
        return [str(error)]


def _details(folder: Path) -> Details:
    state = read_state(folder)
    config = read_config(folder).at_step(state["trainer"]["step"])
    try:
        trainer, free = state["trainer"], state.get(LAYOUT_FREE) or {}
        data = state.get(layout.DATA_STATE)
        return Details(
            step=trainer["step"],
            train_iters=config.train.train_iters,
            samples=trainer["consumed_samples"],
            tokens=recorded_tokens(data, trainer["consumed_samples"], config.model.seq_length),
            skipped_steps=trainer["skipped_steps"],
            layout=state["layout"],
            origin=free.get("imported_from"),
            model=config.model,
            parameters=parameter_count(config.model),
            growth=_growth(config, state["hooks"].get("growth")),
            ema_decay=(state.get(layout.AVERAGE_STATE) or {}).get("decay"),
            stages=tuple(state.get(layout.STAGES_STATE, ())),
            grown=tuple(_grown(state["hooks"].get(layout.GROWTH_STATE) or {})),
            sources=ledger_from_json(data).progress(trainer["consumed_samples"]) if data else {},
            began=state.get(layout.ORIGIN_STATE),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / layout.STATE_FILE} is damaged: {error!r}") from error


def _grown(saved: dict[str, Any]) -> Iterator[tuple[int, str]]:
    for event in saved.get("events", ()):
        if event.get("action") == GROW:
            yield event["step"], event["operator"]


def _growth(config: Config, saved: dict[str, Any] | None) -> GrowthContents:
    """``saved``: the growth hook's state; None where growth begins with the run."""
    schedule = resumed_schedule(config, saved)
    plan, selected = schedule.plan, schedule.selected_at()
    order = [*selected, *(layer for layer, _ in plan.layers if layer not in selected)]
    layers = tuple(
        LoopingLayer(
            layer,
            plan[layer].loops or plan[layer].block_loops,
            plan[layer].kept_heads,
            selected.get(layer),
            plan[layer].other_gate,
        )
        for layer in order
    )
    return GrowthContents(schedule.name, schedule.phase, layers, schedule.window_end, plan)
