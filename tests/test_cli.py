import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sgt.cli import output, positive, run_main, shard
from megatron_sgt.errors import CheckpointError, ConfigError, DataError, SGTError


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(("error", "code"), [(SGTError, 1), (ConfigError, 2), (DataError, 3), (CheckpointError, 4)])
def test_mistakes_of_the_user(error: type[SGTError], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: raise_(error("what is wrong; what to do")))
    assert exit_.value.code == code
    assert capsys.readouterr().err == "error: what is wrong; what to do\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (7, 7)])
def test_results(result: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: result)
    assert exit_.value.code == code


def test_interrupt_and_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: raise_(KeyboardInterrupt()))
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: raise_(ZeroDivisionError()))
    with pytest.raises(SystemExit) as exit_:  # as argparse does
        run_main(lambda: sys.exit(2))
    assert exit_.value.code == 2


def test_reader_of_the_output_goes_away() -> None:
    program = "from megatron_sgt.cli import run_main\nrun_main(lambda: print('x' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_a_positive_number() -> None:
    assert positive("12") == 12
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"above 0, got '{text}'"):
            positive(text)


def test_a_shard() -> None:
    assert (shard("0/1"), shard("3/64")) == ((0, 1), (3, 64))
    for text in ("64/64", "-1/4", "3", "3/", "/4", "1/0", "a/b", "1.0/4"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be i/n with i from 0 to n - 1"):
            shard(text)


def test_an_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert output(str(tmp_path / "new" / "x.bin")) == str(tmp_path / "new" / "x.bin")
    with pytest.raises(argparse.ArgumentTypeError, match=r"cannot write to .*file/x.bin: .*file is a file"):
        output(str(tmp_path / "file" / "x.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
