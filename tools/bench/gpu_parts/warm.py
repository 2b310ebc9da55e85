"""Compiles what a row would launch: its programs land in Triton's cache on disk, where the measuring process looks.

The row itself runs, on tensors of the real shapes and with the same arguments, so that the programs are the same;
every launch stops after the compiler. What it computes is of no meaning and thrown away.
"""

from __future__ import annotations

from typing import Any


def compile_only() -> None:
    """Let every launch of a Triton kernel in this process compile it, and no more."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_it(self: Any, *args: Any, **options: Any) -> Any:
        return launch(self, *args, **{**options, "warmup": True})

    JITFunction.run = compile_it
