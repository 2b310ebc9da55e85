"""Output that ends no command. Whole commands: tests/edges/test_encodings.py and test_full_disk.py."""

import io
import subprocess
import sys

import pytest

from megatron_sgt.streams import ERRORS, PLAIN, is_utf8, make_readable


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-2", "cp1252", "utf-8"])
def test_every_sign_can_be_written(encoding: str) -> None:
    make_readable()
    text = "".join(PLAIN) + "ä ł 北京 🙂 \udcff"
    written = text.encode(encoding, ERRORS).decode(encoding)
    assert "?" not in written
    assert written.startswith("·" if encoding != "ascii" and "·".encode(encoding, "ignore") else "-")
    assert all(sign.isascii() for signs in PLAIN.values() for sign in signs)


def test_decoding_is_left_alone() -> None:
    make_readable()
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", ERRORS)


def test_utf8_has_many_names() -> None:
    for name, wanted in (("UTF-8", True), ("utf8", True), ("utf_8", True), ("iso8859-2", False)):
        assert is_utf8(io.TextIOWrapper(io.BytesIO(), encoding=name)) is wanted


PROGRAM = """\
import sys
from megatron_sgt.streams import outlive_full_disks, report_losses
outlive_full_disks()
outlive_full_disks()  # as a second run of the same process
for number in range(3):
    print("line", number, flush=True)
print("said", file=sys.stderr)
report_losses()
sys.exit(7)
"""


@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_a_full_disk_under_the_output(full: str) -> None:
    with open("/dev/full", "wb") as device:
        streams = {name: device if full in (name, "both") else subprocess.PIPE for name in ("stdout", "stderr")}
        done = subprocess.run([sys.executable, "-c", PROGRAM], **streams, encoding="utf-8", check=False)
    assert done.returncode == 7
    if full == "stdout":
        assert done.stderr.splitlines() == [
            "warning: stdout cannot be written (No space left on device); the run goes on and tries again",
            "said",
            "warning: stdout has lost 21 bytes (No space left on device): the output has gaps",
        ]
    if full == "stderr":
        assert done.stdout == "line 0\nline 1\nline 2\n"


def test_a_reader_that_goes_away_ends_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert b"Broken pipe" in process.stderr.read()
    assert process.wait() == 7
