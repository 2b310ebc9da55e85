"""The rows of the suite in order of worth: what is measured first is kept, whatever happens to the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PARTS = (
    "ceilings", "correctness", "library", "training", "attention", "operations", "passes", "run", "golden",
    "types", "pipeline", "small", "fusions", "profile",
)  # fmt: skip
"""What --part selects; the ceilings are always measured."""
SECTIONS = ("ceilings", "correctness", "training", "attention", "entropy", "operations", "passes", "runs")
"""Lists of a result that rows write to."""
LANES = {"training": "training", "small": "training", "fusions": "training", "profile": "training"}
"""Parts that have a process of their own, so that a model is built while something else is checked."""

SHAPES = ((128, 1), (128, 2), (128, 4), (128, 8), (64, 2), (64, 1), (64, 4), (64, 8))
"""(head size, sequences) of the attention alone."""
WIDTHS = ((2048, 128, 2), (2048, 128, 1), (2048, 128, 4), (2048, 128, 8), (1024, 64, 2), (4096, 128, 2))
"""(hidden size, head size, sequences) of operations and whole passes."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: its own. part: what --part selects it by. section: where its results go.
        call: "module:function" of gpu_parts, a generator of results; arguments: what it gets after the machine.
        limit: seconds after which it is killed.
        compiles: it launches kernels of the loop, which are compiled in the background.
        early: started beside the rows before it, which are not timed.
        last: time is kept back for it.
    """

    name: str
    part: str
    section: str
    call: str
    arguments: tuple[Any, ...] = ()
    limit: float = 60.0
    compiles: bool = False
    early: bool = False
    last: bool = False

    @property
    def lane(self) -> str:
        """The process that it runs in."""
        return LANES.get(self.part, "kernels")


def _checks(types: tuple[str, ...], part: str) -> list[Row]:
    return [
        Row(f"{way} pass, {dtype}", part, "correctness", "correctness:tolerance", (dtype, way), compiles=True)
        for dtype in types
        for way in ("custom", "split", "library")
    ]


def _steps(model: str, part: str, structures: tuple[str, ...]) -> list[Row]:
    return [
        Row(f"{model} {name}", part, "training", "training:step_row", (model, name), limit=90) for name in structures
    ]


def table(dry: bool = False) -> list[Row]:
    """All rows. The models' first steps are made while kernels are checked; a profile is the least of it.

    dry: of a dry run, where all shapes become one tiny one, with one sequence or two; the first two rows have these.
    """
    shapes, broad = (SHAPES[:2], WIDTHS[:2]) if dry else (SHAPES, WIDTHS)
    large = ("vanilla", "vanilla, entropies measured", "fixed, 1 loop", "window", "fixed, 3 loops", "block loop",
             "all heads, 1 loop", "all heads, 3 loops")  # fmt: skip
    small = ("vanilla", "vanilla, entropies measured", "fixed, 1 loop", "window", "fixed, 3 loops")
    sizes = [{"size": size, "batch": batch} for size, batch in shapes]
    widths = [{"width": width, "size": size, "batch": batch} for width, size, batch in broad]
    return [
        Row("ceilings", "ceilings", "ceilings", "machine:ceilings", ("start",)),
        Row("1.2B is built", "training", "training", "training:prepare", ("1.2B",), limit=150, early=True),
        *_checks(("bf16",), "correctness"),
        Row("two runs, the same bits", "correctness", "correctness", "correctness:determinism", compiles=True),
        *(
            Row(f"causal_attention, {heads}", "library", "correctness", "library_attention:check", (heads,))
            for heads in ("MHA", "GQA")
        ),
        Row("documents, GQA", "library", "correctness", "library_attention:documents", ("GQA",)),
        *_steps("1.2B", "training", large),
        *(
            Row(f"attention {_words(s)}", "attention", "attention", "kernels:attention", (s,), compiles=True)
            for s in sizes
        ),
        Row("entropies", "operations", "entropy", "kernels:entropies", compiles=True),
        *(
            Row(f"operations {_words(w)}", "operations", "operations", "operations:rows", (w,), compiles=True)
            for w in widths
        ),
        *(Row(f"pass {_words(w)}", "passes", "passes", "kernels:passes", (w,), compiles=True) for w in widths),
        Row("a run, killed and resumed", "run", "runs", "runs:killed_and_resumed", limit=120),
        Row("golden trajectory a, fp32", "golden", "correctness", "runs:golden", limit=120),
        Row("CUDA graph", "types", "correctness", "correctness:graph_capture"),
        *_checks(("fp32", "fp16"), "types"),
        Row("an output that was sent", "pipeline", "correctness", "pipeline:given_away"),
        Row("settings of a pipeline", "pipeline", "correctness", "pipeline:settings"),
        *_steps("300M", "small", small),
        Row("1.2B vanilla, fusions off", "fusions", "training", "training:without_fusions", ("1.2B",), limit=120),
        Row("1.2B profile", "profile", "training", "training:profile_row", ("1.2B",), limit=90),
        Row("ceilings, again", "ceilings", "ceilings", "machine:ceilings", ("end",), limit=20, last=True),
    ]  # fmt: skip


def _words(shape: dict[str, int]) -> str:
    letters = {"width": "D", "size": "d", "batch": "B"}
    return " ".join(f"{letters[name]}{value}" for name, value in shape.items())
