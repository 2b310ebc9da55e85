"""The GPU suite, executed on a CPU: every row runs, nothing is reported as if it had been measured, and what breaks
loses nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.exhaustive import exhaustive

pytest.importorskip("triton")

MEASURED = re.compile(r"_(us|ms|share|percent|tflops|second|gb)$|^(ms|share|share_of_matmul_ceiling)$")
"""Columns that hold a time, a rate or a share."""
NOT_KNOWN = {"datasheet_tflops", "mfu_percent", "memory_gb"}
"""Of a CPU."""


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))


def without_git(folder: Path) -> str:
    """A PATH with the programs of a small machine: neither git nor nvidia-smi among them."""
    for name in ("sh", "uname", "gcc", "cc", "g++", "c++", "ld", "as", "openssl"):
        program = shutil.which(name)
        if program:
            (folder / name).symlink_to(program)
    return str(folder)


def suite(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The suite where only the programs of ``path`` are to be found."""
    command = [sys.executable, "tools/bench/gpu_suite.py", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, "PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def measured(rows: list[dict[str, Any]]) -> set[Any]:
    """What stands where a measurement does."""
    return {value for row in rows for name, value in row.items() if MEASURED.search(name) and name not in NOT_KNOWN}


@pytest.mark.parametrize("left_out", [("run", "golden", "small"), exhaustive(((),))], ids=["a share", "all"])
def test_dry_run_without_git(left_out: tuple[str, ...], tmp_path: Path) -> None:
    """Two rows start runs of their own, whose processes take as long as all others; those of the smaller model do in
    a dry run what those of the larger one do."""
    from gpu_parts.rows import PARTS, table

    out, programs = tmp_path / "out", tmp_path / "bin"
    programs.mkdir()
    parts = [word for part in PARTS if part not in left_out for word in ("--part", part)]
    done = suite(without_git(programs), "--dry-run", "--minutes", "14", "--out", str(out), *(parts if left_out else []))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list(out.iterdir())) == 2
    (file,) = out.glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {row["row"] for row in result["rows"]} == {row.name for row in table(dry=True) if row.part not in left_out}
    assert not [row for row in result["rows"] if row["error"] is not None]
    about = result["about"]
    assert about["dry_run"] and about["commit"] is None and len(about["sources"]) == 12
    assert [row["when"] for row in result["ceilings"]] == ["start", "end"]
    assert measured(result["ceilings"]) == {"dry"}
    checks = {row["check"]: row["passed"] for row in result["correctness"]}
    assert len(checks) == 17 - ("golden" in left_out) and checks.pop("CUDA graph") is None and all(checks.values())
    assert [row["measured"] for row in result["targets"]] == ["dry"] * 4 + [None]
    structures = [row["structure"] for row in result["training"] if "structure" in row]
    models = 2 - ("small" in left_out)
    assert structures[0] == "vanilla" and structures.count("fixed, 3 loops") == models
    assert len(structures) == 9 + 5 * (models - 1)
    (profile,) = (row["profile"] for row in result["training"] if "profile" in row)
    assert profile and "compiled_us" in result["passes"][0]
    for run in result["runs"]:
        assert run["passed"] and run["resumed_at"] >= 20 and run["repeated"] > 0 and run["steps"] == 60
    assert len(result["runs"]) == ("run" not in left_out)
    for name in ("passes", "attention", "operations", "entropy"):
        assert measured(result[name]) == {"dry"}, name
    steps = [row for row in result["training"] if "structure" in row]
    assert measured(steps) == measured(profile) == {"dry"}
    unmeasured = {**result, "about": None, "correctness": None, "targets": None}
    assert not re.search(r"\d\.\d", re.sub(r"1\.2B", "", json.dumps(unmeasured)))
    assert "It measures nothing" in file.with_suffix(".md").read_text(encoding="utf-8")


BROKEN = """
import os, signal, time

def fine(machine, number):
    yield {"number": number, "attention": machine.attention}

def half(machine):
    yield {"number": 2}
    raise RuntimeError("no such kernel\\nand more")

def dies(machine):
    yield {"number": 3}
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(machine):
    yield {"number": 4}
    os.fork() or time.sleep(600)
    time.sleep(600)

def poisons(machine):
    import gpu_parts.worker
    gpu_parts.worker._healthy = lambda _: False
    import sys
    sys.modules["__main__"]._healthy = lambda _: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def wrong(machine):
    yield {"check": "custom pass, bf16", "passed": False, "detail": "error 1"}
"""


def test_what_breaks_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that raise, die, hang or poison their process, each followed by one that works."""
    from gpu_parts.drive import Drive
    from gpu_parts.rows import Row

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/rows.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = []
    for number, name in enumerate(("half", "dies", "hangs", "poisons", "wrong")):
        section, limit = ("correctness" if name == "wrong" else "runs"), (3.0 if name == "hangs" else 120.0)
        rows.append(Row(name, "run", section, f"broken.rows:{name}", limit=limit))
        rows.append(Row(f"after {name}", "run", "passes", "broken.rows:fine", (number,), limit=120))
    kept: list[str] = []
    drive = Drive(rows, True, time.monotonic() + 800, lambda result: kept.append(json.dumps(result)))
    result = drive.run()
    assert [row["number"] for row in result["passes"]] == list(range(5))
    assert [row["number"] for row in result["runs"]] == [2, 3, 4]  # what they gave before they broke
    errors = {row["row"]: row["error"] for row in result["rows"] if row["error"]}
    assert errors == {
        "half": "RuntimeError: no such kernel",
        "dies": "its process ended with code -9",
        "hangs": "killed after 3 s",
        "poisons": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    # Custom attention that was wrong is not used by the rows after it.
    assert [row["attention"] for row in result["passes"]] == [*["auto"] * 4, "library"]
    lengths = [len(json.loads(text)["passes"]) for text in kept]
    assert lengths == sorted(lengths) and set(lengths) == set(range(6))  # kept as it came
    assert all(worker.process.poll() is not None for worker in drive.workers.values())


def test_rows_that_the_time_does_not_reach_are_named() -> None:
    from gpu_parts.drive import Drive
    from gpu_parts.rows import Row

    rows = [
        Row("first", "run", "runs", "machine:identity"),
        Row("last", "ceilings", "ceilings", "machine:ceilings", ("end",), limit=1e3, last=True),
    ]
    drive = Drive(rows, True, time.monotonic() + 85, lambda result: None)  # 90 s are kept back for the last
    result = drive.run()
    notes = {row["row"]: row["error"] for row in result["rows"]}
    assert notes["first"] == "skipped: the time is used up" and notes["last"] is None


def test_results_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the midst of writing leaves the former result whole."""
    from gpu_parts import figures

    file = tmp_path / "h100.json"
    figures.write({"about": {"device": "first"}}, file)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        figures.write({"about": {"device": "second"}}, file)
    assert json.loads(file.read_text(encoding="utf-8"))["about"]["device"] == "first"


def test_a_machine_without_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_parts import machine

    monkeypatch.setenv("PATH", str(tmp_path))
    (about,) = machine.identity(machine.Machine.make(dry=True))
    assert about["commit"] is None and about["sources"] == machine.sources()
    assert set(machine.clocks("before").values()) == {None}
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 612.50, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine.clocks("x") == {"sm_mhz_x": 1980.0, "watts_x": 612.5, "celsius_x": None}


def test_buffers_are_used_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that they do not fit the level-2 cache: 33 MB of input would be found in the 50 MB of an H100."""
    from gpu_parts.machine import Machine

    calls: list[int] = []
    machine = Machine.make(dry=True)
    machine.dry = False
    machine.seconds([lambda n=n: calls.append(n) for n in range(3)], repeats=2, calls=4)  # type: ignore[misc]
    assert calls[:3] == [0, 1, 2] and calls[3:] == [n % 3 for n in range(12)]
    cache = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    size = 4096 * 2 * 2048 * 2
    assert (machine.copies(size) - 1) * size >= 3 * cache.L2_cache_size


def test_a_dry_run_leaves_out_repetitions_alone() -> None:
    """Whatever shape of a kernel a dry run leaves out, it executes another that is as tiny."""
    from gpu_parts.kernels import shape_of
    from gpu_parts.machine import Machine
    from gpu_parts.rows import table

    def executed(dry: bool) -> set[str]:
        machine = Machine.make(dry=True)
        return {
            f"{row.call} {[shape_of(machine, a) if isinstance(a, dict) else a for a in row.arguments]}"
            for row in table(dry)
        }

    assert executed(dry=True) == executed(dry=False) and len(table(True)) == len(table()) - 14


def test_the_table_is_in_order_of_worth() -> None:
    from gpu_parts.rows import PARTS, SECTIONS, table

    rows = table()
    order = list(dict.fromkeys(row.part for row in rows if not row.early))
    assert tuple(order) == PARTS and {row.section for row in rows} == set(SECTIONS)
    assert len({row.name for row in rows}) == len(rows)
    steps = [row.name for row in rows if row.part == "training"]
    assert steps[1:4] == ["1.2B vanilla", "1.2B vanilla, entropies measured", "1.2B fixed, 1 loop"]


COMPILES = """
import sys
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from megatron_sgt.ops import entropy_triton, tiles
from gpu_parts.warm import compile_only

driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32)))
compiled = []
original = JITFunction._do_compile
def watch(self, *args, **kwargs):
    found = original(self, *args, **kwargs)
    compiled.append((self.fn.__name__, len(found.asm["cubin"])))
    return found
JITFunction._do_compile = watch
compile_only()
query, key = torch.zeros(256, 1, 2, 64, dtype=torch.bfloat16), torch.zeros(256, 1, 2, 64, dtype=torch.bfloat16)
entropy_triton.last_row_entropy(query, key)
print([name for name, size in compiled if size > 1000])
"""


def test_kernels_are_compiled_and_not_launched(tmp_path: Path) -> None:
    """On a machine without a GPU a launch would fail; what is compiled lies in Triton's cache on disk."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools/bench")])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "['part_kernel', 'merge_kernel']", done.stderr[-2000:]
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_targets_are_held_against_what_was_measured() -> None:
    from gpu_parts.targets import verdicts

    fixed = {
        "model": "1.2B",
        "structure": "fixed, 1 loop",
        "time_overhead_percent": 1.4,
        "flops_overhead_percent": 1.0,
    }
    vanilla = {"model": "1.2B", "structure": "vanilla", "mfu_percent": 44.0}
    measured = {"model": "1.2B", "structure": "vanilla, entropies measured", "time_overhead_percent": 0.1}
    attention = [
        {"B": 1, "custom_share": 0.1, "library_share": 0.2},
        {"B": 2, "custom_share": 0.6, "library_share": 0.4},
        {"B": 4, "custom_share": 0.3, "library_share": 0.55},
    ]
    found = verdicts(
        {"training": [vanilla, measured, fixed, {"model": "1.2B", "skipped": "x"}], "attention": attention}
    )
    assert [(row["measured"], row["met"]) for row in found] == [
        (1.4, True),
        (1.4, False),
        (0.55, True),
        (0.1, True),
        (44.0, False),
    ]
    assert {row["met"] for row in verdicts({})} == {None}


def test_both_ways_of_an_operation_compute_the_same() -> None:
    """Else their times would say nothing."""
    from gpu_parts.loop_pass import pass_inputs
    from gpu_parts.operations import operations, rotary

    p = pass_inputs(24, 2, 64, 16, torch.device("cpu"), torch.float32)
    *compared, weights = operations(p)
    assert len(compared) == 5
    for operation in compared:
        found = operation.kernel()
        found = found[0] if isinstance(found, tuple) else found
        wanted = operation.eager().flatten(2)
        torch.testing.assert_close(found.flatten(2), wanted, rtol=1e-4, atol=1e-5, msg=operation.name)
    assert weights.kernel() is weights.eager() is None
    assert rotary(p, 64).bytes == 8 * 24 * 2 * 64 * 4


def test_the_readme_shows_the_newest_result(tmp_path: Path) -> None:
    from gpu_parts import readme

    written = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = written.partition(f"{readme.BEGIN}\n")
    shown, end, _ = rest.partition(readme.END)
    assert end and shown == readme.section(ROOT / "benchmarks/results")

    about = {"device": "H200", "dry_run": False, "dtype": "bf16", "commit": "abc", "versions": {"torch": "2"}}
    row = {"model": "1.2B", "structure": "vanilla", "step_ms": 100.0}
    for name, figure, dry in (
        ("h200-2026-11-01-120000", 1.0, False),
        ("a100-2026-11-02-120000", 2.0, False),
        ("dry-run-2026-11-03-120000", 3.0, True),
    ):
        result = {"about": {**about, "dry_run": dry}, "training": [{**row, "step_ms": figure}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    readme.update(tmp_path, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "a100-2026-11-02-120000.md" in text and "| 1.2B | vanilla | - | 2 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = suite(os.environ["PATH"], "--out", str(tmp_path))
    assert done.returncode == 2 and "--dry-run executes it on a CPU" in done.stderr
    assert not list(tmp_path.iterdir())
