from pathlib import Path

import pytest

from megatron_sgt.config import load_config
from megatron_sgt.errors import ConfigError, SGTError
from megatron_sgt.launch.sbatch import sbatch_script
from megatron_sgt.submit import job as jobs
from tests.helpers.single import small_config
from tests.launch.test_sbatch import JOB


def test_a_container_is_shown_what_lies_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(
        logging={"run_dir": "runs/a"},
        data={
            "data_path": ["1", "/data/c4/part", "1", "/data/c4/more/part"],
            "data_cache_path": "/scratch/cache",
            "valid": {"wiki": "/valid/wiki/part"},
        },
        checkpoint={"save": "/scratch"},
        phases=[{"until_steps": 2}, {"data_path": "/late/part"}],
    )
    assert jobs.outside_folders(config) == ["/scratch", "/data/c4", "/late", "/valid/wiki"]


def test_writes_what_restarts_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config()
    (tmp_path / JOB.folder).mkdir(parents=True)
    (tmp_path / JOB.folder / "starts").write_text("global_step1\n")
    script = jobs.write_job(JOB, config)
    assert script.read_text() == sbatch_script(JOB)
    assert load_config(script.parent / "config.yaml") == config
    assert sorted(path.name for path in script.parent.iterdir()) == ["config.yaml", "job.sbatch"]


def test_submits_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch on PATH; .*: sbatch job.sbatch"):
        jobs.submit(Path("job.sbatch"))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "12;cluster"\n')
    sbatch.chmod(0o755)
    assert jobs.submit(Path("job.sbatch")) == "12"
    sbatch.write_text("#!/bin/sh\necho 'Invalid account' >&2; exit 1\n")
    with pytest.raises(SGTError, match=r"Slurm refuses job.sbatch: Invalid account"):
        jobs.submit(Path("job.sbatch"))


@pytest.mark.parametrize(
    ("nodes", "each", "says"),
    [
        (3, 8, r"^parallel: .*_size 8 x .*_size 8 = 64 does not divide the 24 ranks of --nodes 3 with 8 each; .* 8 or"),
        (4, 12, "--nodes 4 with 12 each; ask for --nodes 16 or a multiple of it"),
    ],
)
def test_ranks_that_do_not_divide_need_other_nodes(nodes: int, each: int, says: str) -> None:
    sizes = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 8}
    config = small_config(
        model={"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 8, "vocab_size": 1024}, parallel=sizes
    )
    jobs.check_nodes(config, 16, 12)
    with pytest.raises(ConfigError, match=says):
        jobs.check_nodes(config, nodes, each)
