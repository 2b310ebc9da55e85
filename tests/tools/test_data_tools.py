"""The data tools as a user starts them: separate processes, their output and their exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(tool, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds corpus.jsonl and sp.model, both made by the tools."""
    path = tmp_path_factory.mktemp("tools")
    done = run("build_corpus", "--output", path / "corpus.jsonl")
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout and "MB of text" in done.stdout
    done = run(
        "train_tokenizer", "--input", path / "corpus.jsonl", "--output", path / "sp.model",
        "--vocab-size", 600, "--sample-bytes", 500_000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "600 ids" in done.stdout and done.stderr == ""
    return path


def test_corpus_to_data_set(folder: Path) -> None:
    done = run(
        "preprocess_data", "--input", folder / "corpus.jsonl", "--output-prefix", folder / "out" / "python",
        "--tokenizer-model", folder / "sp.model", "--workers", 2, "--append-eod", "--checksum",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings of the libraries"
    num_documents = sum(1 for _ in (folder / "corpus.jsonl").open(encoding="utf-8"))
    assert f"{num_documents:,} documents" in done.stdout and "tokens/s with 2 worker(s)" in done.stdout
    assert "sha256 " in done.stdout
    metadata = json.loads((folder / "out" / "python_text_document.json").read_text())
    assert metadata["documents"] == num_documents and metadata["append_eod"]
    assert {path.suffix for path in (folder / "out").iterdir()} == {".bin", ".idx", ".json"}


def test_an_array_of_jobs_and_their_union(folder: Path) -> None:
    """The tasks of examples/slurm/preprocess.sbatch, of which there are two here; each started twice."""
    script = (ROOT / "examples/slurm/preprocess.sbatch").read_text()
    assert "#SBATCH --array=0-63\n" in script and "shards=64 " in script
    small, prefix = folder / "small.jsonl", folder / "array" / "x"
    small.write_text("".join(f'{{"text": "layer {i}"}}\n' for i in range(99)))
    environment = {
        **ENVIRONMENT, "INPUT": str(small), "PREFIX": str(prefix), "TOKENIZER": str(folder / "sp.model"),
        "SLURM_CPUS_PER_TASK": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    for task, said in ((0, "1 worker(s)"), (1, "1 worker(s)"), (1, "finished before, kept")):
        done = subprocess.run(
            ["bash", "-c", script.replace("shards=64", "shards=2")],
            cwd=ROOT,
            env={**environment, "SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and said in done.stdout, done.stderr
    parts = [f"{prefix}-0000{i}-of-00002_text_document.idx" for i in range(2)]
    done = run("merge_data", *parts, "--output-prefix", f"{prefix}_text_document")
    assert done.returncode == 0 and "99 documents" in done.stdout and "of 2 data sets" in done.stdout, done.stderr


def test_a_killed_job_leaves_nothing_readable_and_no_workers(folder: Path) -> None:
    big = folder / "big.jsonl"
    big.write_text((folder / "corpus.jsonl").read_text(encoding="utf-8") * 5, encoding="utf-8")
    target = folder / "killed"
    job = subprocess.Popen(
        command("preprocess_data", "--input", big, "--output-prefix", target / "x", "--tokenizer-model",
                folder / "sp.model", "--workers", 2),
        env=ENVIRONMENT,
    )  # fmt: skip
    partial = target / "x_text_document.bin.tmp"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
    workers = children_of(job.pid)
    assert len(workers) >= 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert {path.name for path in target.iterdir()} == {
        "x_text_document.bin.tmp", "x_text_document.idx.tmp", "x.resume"
    }  # fmt: skip
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_mistakes(folder: Path) -> None:
    model = ("--tokenizer-model", folder / "sp.model")
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 1}\n')
    for tool, arguments, code, message in [
        ("build_corpus", ["--output", bad], 3, "exists already"),
        (
            "train_tokenizer",
            ["--input", bad, "--output", folder / "x.model", "--vocab-size", 300],
            3,
            "bad.jsonl:2",
        ),
        ("train_tokenizer", ["--input", bad], 2, "required"),
        (
            "preprocess_data",
            ["--input", folder / "no", "--output-prefix", folder / "x", *model],
            3,
            "no does not exist",
        ),
        (
            "preprocess_data",
            ["--input", bad, "--output-prefix", "x", *model, "--workers", 0],
            2,
            "at least 1",
        ),
        (
            "preprocess_data",
            ["--input", bad, "--output-prefix", "x", *model, "--shard", "2/2"],
            2,
            "must be i/n with i from 0 to n - 1, got '2/2'",
        ),
        (
            "preprocess_data",
            ["--input", bad, "--output-prefix", "x", "--tokenizer-model", bad],
            3,
            "not a sentencepiece",
        ),
    ]:
        done = run(tool, *arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert message in done.stderr and done.stdout == ""
        if code != 2:
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
