"""A run as a Slurm job: its files are written beside the run, then it is submitted with sbatch."""

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_sgt.checkpoint.layout import LATEST_FILE
from megatron_sgt.config import Config
from megatron_sgt.config.base import count
from megatron_sgt.errors import ConfigError, SGTError
from megatron_sgt.files import replace_text
from megatron_sgt.launch.sbatch import CONFIG, SCRIPT, SlurmJob, sbatch_script

FOLDER = "slurm"
"""In logging.run_dir: the job's script, configuration and logs."""


def check_nodes(config: Config, nodes: int, tasks_per_node: int) -> None:
    """Whether the ranks hold whole copies of the model.

    Raises:
        ConfigError: they do not; with the least number of nodes that does.
    """
    ranks, size = nodes * tasks_per_node, config.parallel.model_parallel_size
    if ranks % size:
        least = size // math.gcd(size, tasks_per_node)
        raise ConfigError(
            f"{config.parallel.model_parallel_sizes} does not divide the {count(ranks, 'rank')} of --nodes {nodes} "
            f"with {tasks_per_node} each; ask for --nodes {least} or a multiple of it, or change the sizes"
        )


def job_folder(config: Config) -> str:
    """Folder of everything that belongs to the job of this run."""
    return str(Path(config.logging.run_dir, FOLDER))


def job_name(config: Config) -> str:
    """One name per run directory: Slurm runs one job of a name at a time (--dependency=singleton)."""
    return f"sgt:{config.logging.run_dir}"


def latest_file(config: Config) -> str:
    """The file that names the newest checkpoint."""
    return str(config.save_dir / LATEST_FILE)


def outside_folders(config: Config) -> list[str]:
    """Folders outside the current one that the run reads or writes, for a container to mount."""
    here = Path.cwd()
    folders = dict.fromkeys(place.absolute() for place in _places(config))
    outside = [folder for folder in folders if not folder.is_relative_to(here)]
    return [str(f) for f in outside if not any(f != g and f.is_relative_to(g) for g in outside)]


def _places(config: Config) -> Iterator[Path]:
    yield from (Path(config.logging.run_dir), config.save_dir, config.data_cache_dir)
    yield from (Path(prefix).parent for prefix in (*config.data_prefixes, *config.data.valid.values()))
    if config.checkpoint.load is not None:
        yield Path(config.checkpoint.load)
    if config.evaluation.include_path is not None:
        yield Path(config.evaluation.include_path)
    if config.data.tokenizer is not None and os.path.exists(config.data.tokenizer.model):
        yield Path(config.data.tokenizer.model).parent


def write_job(job: SlurmJob, config: Config) -> Path:
    """Write script and resolved configuration; returns the script. Restarts read these, not the originals.

    The count of starts of an earlier submission is reset.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / CONFIG, config.to_yaml())
    (folder / "starts").unlink(missing_ok=True)
    script = folder / SCRIPT
    replace_text(script, sbatch_script(job))
    return script


def submit(script: Path) -> str:
    """Submit ``script`` with sbatch; returns the job's id.

    Raises:
        ConfigError: there is no sbatch here.
        SGTError: Slurm refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"{script} is written, but there is no sbatch on PATH; submit it on a login node: sbatch {script}"
        )
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        raise SGTError(f"Slurm refuses {script}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]
