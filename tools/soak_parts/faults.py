"""The faults: which there are, how often they come, and what the damaging ones do to a checkpoint and its disk."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAULTS = {
    "kill one rank": 3,
    "kill all ranks": 3,
    "kill one rank inside a save": 5,
    "kill all ranks inside a save": 5,
    "kill all, one of them late in a save": 5,
    "SIGTERM to one rank": 2,
    "SIGUSR1 to one rank": 2,
    "truncated file": 2,
    "flipped bit": 2,
    "deleted file": 2,
    "full disk": 2,
    "slow rank": 2,
}
"""Kinds and how often they come, relative to each other."""
DAMAGES = ("truncated file", "flipped bit", "deleted file")


def damage(folder: Path, kind: str, rng: random.Random) -> str:
    """Harm one file of a checkpoint, the manifest too; returns the checkpoint's name."""
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = bytearray(file.read_bytes())
    if kind == "deleted file":
        file.unlink()
    elif kind == "truncated file":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
    return folder.name


@contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[bool]:
    """A file system of its own at ``folder``, where this user may mount one; yields whether."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
