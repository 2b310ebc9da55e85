"""Every command in the documentation exists: its script, its flags, its files, its settings, its make target.

test_pages.py executes five pages; here the others, which need clusters, GPUs or hours, are held against the code.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from megatron_sgt.config.reference import reference
from tests.docs.shell_blocks import PAGES, ROOT, Command, commands
from tests.helpers.commands import run_script

EVERYDAY = {
    "cd",
    "echo",
    "export",
    "git",
    "pip",
    "apt-get",
    "ls",
    "cat",
    "tail",
    "less",
    "watch",
    "rm",
    "mkdir",
    "pytest",
    ".",
}
"""Programs of the system, whose arguments are not ours to check."""
CLUSTER = {"sbatch", "scancel", "squeue", "sacct", "scontrol", "sinfo", "enroot", "apptainer"}
RUNTIMES = {"vllm"}
"""Programs of other packages that serve models."""
OURS = {"make", "python", "python3", "torchrun", "deepspeed", "srun", "mpirun", "bash", "lm_eval"}

ALL = [command for page in PAGES for command in commands(page)]
SCRIPTS = sorted({command.script[0] for command in ALL if command.script is not None})


@functools.cache
def help_of(script: str) -> str:
    done = run_script(script, ["--help"], ROOT)
    assert done.code == 0, done.err
    return done.out


def problems(command: Command) -> list[str]:
    """What is wrong with a command; empty if nothing is."""
    if command.program not in EVERYDAY | CLUSTER | RUNTIMES | OURS:
        return [f"unknown program {command.program}"]
    if command.program == "make":
        return _make_problems(command.words[1:])
    if command.script is None:
        return []
    script, arguments = command.script
    if not (ROOT / script).exists():
        return [f"no such script: {script}"]
    return [] if script.endswith(".sh") else _script_problems(script, arguments)


def _make_problems(words: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word]
    return [f"no make target {t}" for t in targets if not re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE)]


def _script_problems(script: str, arguments: list[str]) -> list[str]:
    known = set(re.findall(r"--[a-zA-Z][\w-]*", help_of(script)))
    wrong = []
    for word in arguments:
        if word in (">", "|", "&&", ";", "2>&1", "&"):
            break
        if word.startswith("--"):
            flag = word.partition("=")[0]
            wrong += [] if flag in known else [f"{script} has no {flag}"]
        elif re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+=.*", word):
            key = word.partition("=")[0]
            if not key.startswith("deepspeed.") and f"| `{key}` |" not in reference({}):
                wrong.append(f"no setting {key}")
        elif word.startswith(("examples/", "tests/")) and not (ROOT / word).exists():
            wrong.append(f"no such file: {word}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    wrong = [f"{c.line}: {problem}" for c in commands(page) for problem in problems(c)]
    assert not wrong, "\n".join(wrong)


def test_there_are_commands() -> None:
    assert len(ALL) >= 20 and len(SCRIPTS) >= 5


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("make quickstart", ""),
        ("make lunch", "no make target lunch"),
        ("python tools/report.py runs/x", ""),
        ("python tools/report.py --picture runs/x", "no --picture"),
        ("OMP_NUM_THREADS=1 python tools/gone.py", "no such script"),
        (
            "torchrun --nproc-per-node 8 pretrain_sgt.py --config examples/configs/sgt_300m.yaml optim.lr=1e-3",
            "",
        ),
        ("torchrun --nproc-per-node 8 pretrain_sgt.py --config examples/configs/gone.yaml", "no such file"),
        (
            "python pretrain_sgt.py --config examples/configs/sgt_300m.yaml optim.rate=1",
            "no setting optim.rate",
        ),
        ("frobnicate --now", "unknown program"),
    ],
)
def test_the_check_sees_what_it_should(line: str, wrong: str) -> None:
    found = problems(Command("page", line))
    assert bool(found) == bool(wrong) and wrong in "".join(found)


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken, "\n".join(broken)


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text]
    assert not missing, f"README.md links none of {missing}"
