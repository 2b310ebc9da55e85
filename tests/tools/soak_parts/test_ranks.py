import signal
import time
from pathlib import Path

from soak_parts.ranks import RANKS, Ranks
from soak_parts.workload import LAYOUTS, small_config, write_data

from tests.helpers.ranks import start_server


def write_config(folder: Path) -> Path:
    config = small_config(folder / "run", write_data(folder), LAYOUTS["dp2-zero1"], {})
    (folder / "run.yaml").write_text(config.to_yaml())
    return folder / "run.yaml"


def test_ranks_leave_with_their_codes_or_are_killed(tmp_path: Path) -> None:
    start_server()
    (tmp_path / "bad.yaml").write_text("model: 3\n")
    assert Ranks(tmp_path / "bad.yaml", tmp_path / "log").end(60) == [2] * RANKS
    assert "error: " in (tmp_path / "log").read_text()
    ranks = Ranks(write_config(tmp_path), tmp_path / "log")
    assert ranks.alive()
    ranks.send(signal.SIGKILL, 0)
    deadline = time.monotonic() + 30
    while ranks.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    codes = ranks.end(0.0)
    assert codes[0] == -signal.SIGKILL and not ranks.alive()
