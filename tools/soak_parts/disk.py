"""What happens to the files of a run: damage to a checkpoint, and a disk that can be filled."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def filled(folder: Path, room: int) -> Iterator[None]:
    """Leave ``room`` bytes on the disk of ``folder`` inside the context."""
    ballast = folder / "ballast"
    with ballast.open("wb") as stream:
        while (free := shutil.disk_usage(folder).free) > room:
            with contextlib.suppress(OSError):  # a save that goes on takes room meanwhile
                taken = os.fstat(stream.fileno()).st_size
                os.posix_fallocate(stream.fileno(), taken, free - room)
    try:
        yield
    finally:
        ballast.unlink()
