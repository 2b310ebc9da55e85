"""A process that runs rows: jobs come as JSON lines on stdin, answers leave as JSON lines on what was stdout.

A row's failure is an answer like any other. After one the device is tried: an error that sticks to the process (an
illegal address poisons all later calls) ends it, and the suite continues in a fresh one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from types import ModuleType
from typing import Any, TextIO


def serve(machine_values: dict[str, Any], answers: TextIO) -> None:
    """Run the jobs of stdin until it ends. A job: {"call", "arguments", "state", "left"}.

    Answers: {"row": result} as often as the row gives one, then {"done": true, "error": text or null,
    "poisoned": bool}.
    """
    from gpu_parts.machine import Machine, first_line

    machine = Machine.make(**machine_values)
    if machine.warm:
        from gpu_parts.warm import compile_only

        compile_only()
    before: ModuleType | None = None
    for line in sys.stdin:
        job, error, poisoned = json.loads(line), None, False
        try:
            machine.restore(job["state"], time.monotonic() + job["left"])
            name, _, function = job["call"].partition(":")
            module = importlib.import_module(name if "." in name else f"gpu_parts.{name}")
            if before is not None and before is not module and hasattr(before, "release"):
                before.release()
            before = module
            for row in getattr(module, function)(machine, *job["arguments"]):
                print(json.dumps({"row": row}), file=answers, flush=True)
        except Exception as problem:
            traceback.print_exc()
            error, poisoned = first_line(problem), not _healthy(machine)
        machine.free(quietly=poisoned)
        print(json.dumps({"done": True, "error": error, "poisoned": poisoned}), file=answers, flush=True)
        if poisoned:
            return


def _healthy(machine: Any) -> bool:
    import torch

    from megatron_sgt.parallel.device import synchronize

    try:
        synchronize(machine.device)
        return bool(torch.ones(2, device=machine.device).sum() == 2)
    except Exception:
        return False


def main() -> None:
    """Serve with the values of a Machine in the first argument. What rows print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), answers)
    answers.flush()
    os._exit(0)  # no destructors on a device that may be poisoned, no threads waited for


if __name__ == "__main__":
    main()
