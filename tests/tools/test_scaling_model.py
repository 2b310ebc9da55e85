"""The scaling table: what it prints and what it says of itself."""

from pathlib import Path

from tests.helpers.commands import run_script


def test_a_table_with_its_assumptions(tmp_path: Path) -> None:
    done = run_script("tools/bench/scaling_model.py", ["--sizes", "7b", "70b", "--gpus", "8", "64"], tmp_path)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "A model, not calibrated. Assumed, for nodes of 8:"
    assert "NVIDIA H100 80GB HBM3: 989 TFLOP/s dense bf16" in done.out
    table = [line for line in lines if line.split()[:1] in (["8"], ["64"])]
    assert len(table) == 4
    assert "does not fit" in table[2], "70 billion parameters on 8 GPUs of 80 GB"
    assert all(
        line.endswith("| not calibrated") and line.count("|") == 4 and line.count("%") == 3
        for line in (table[0], table[1], table[3])
    )


def test_an_unknown_gpu_is_a_usage_error(tmp_path: Path) -> None:
    done = run_script("tools/bench/scaling_model.py", ["--gpu", "tpu"], tmp_path)
    assert done.code == 2
    assert "GPU 'tpu' is not in the table" in done.err
