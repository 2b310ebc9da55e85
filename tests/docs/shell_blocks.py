"""The shell commands in the documentation, as words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"(<<\s*'?(\w+)'?[^\n]*\n).*?^\2$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_LAUNCHERS = ("torchrun", "deepspeed", "srun", "mpirun", "python", "python3", "bash")


@dataclass(frozen=True)
class Command:
    """One command line of a page."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words without comments and leading VARIABLE=value."""
        words = shlex.split(self.line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words = words[1:]
        return words

    @property
    def program(self) -> str:
        """The first word."""
        return self.words[0]

    @property
    def script(self) -> tuple[str, list[str]] | None:
        """(script of the repository, its arguments) if the command runs one, whatever launches it."""
        words = self.words
        if words[0] in _LAUNCHERS:
            for place, word in enumerate(words[1:], start=1):
                if word.endswith((".py", ".sh")):
                    return word, words[place + 1 :]
        return None


def blocks(page: Path) -> list[str]:
    """The bash blocks of a page, as they stand."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[Command]:
    """Every command line of a page's bash blocks; continued lines are one."""
    text = _HERE_DOCUMENT.sub(r"\1", "\n".join(blocks(page)))
    lines = text.replace("\\\n", " ").split("\n")
    found = [re.sub(r"\s+", " ", line.strip()) for line in lines]
    name = str(page.relative_to(ROOT))
    return [Command(name, line) for line in found if line and not line.startswith("#")]
