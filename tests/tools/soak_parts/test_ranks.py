import signal
import time
from pathlib import Path

from soak_parts.ranks import Ranks
from soak_parts.workload import LAYOUTS, small_config, write_data

from tests.helpers.ranks import start_server


def write_config(folder: Path) -> Path:
    config = small_config(folder / "run", write_data(folder), LAYOUTS["dp2-zero1"], {})
    (folder / "run.yaml").write_text(config.to_yaml())
    return folder / "run.yaml"


def test_ranks_leave_with_their_codes_or_are_killed(tmp_path: Path) -> None:
    start_server()
    (tmp_path / "bad.yaml").write_text("model: 3\n")
    refused = Ranks(tmp_path / "bad.yaml", tmp_path / "log")
    assert refused.first_code(60) == 2 and "error: " in (tmp_path / "log").read_text()
    assert all(process.exitcode is not None for process in refused.processes)
    ranks = Ranks(write_config(tmp_path), tmp_path / "log")
    ranks.freeze()
    stats = [Path(f"/proc/{process.pid}/stat").read_text() for process in ranks.processes]
    assert ranks.alive() and all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)
    ranks.send(signal.SIGCONT)
    ranks.send(signal.SIGKILL, 0)
    deadline = time.monotonic() + 30
    while ranks.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    codes = ranks.end(0.0)
    assert codes[0] == -signal.SIGKILL and not ranks.alive()
