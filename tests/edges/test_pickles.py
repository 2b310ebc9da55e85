"""Pickles that hold code, in every place where a file is read: nothing runs, and one line names the code."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.restricted import load_restricted
from megatron_sgt.data.index_cache import check_indices
from megatron_sgt.errors import CheckpointError, DataError
from tests.helpers.checkpoints import write_grown_checkpoint
from tests.helpers.commands import run_here, run_script
from tests.helpers.deepspeed_files import write_manifest
from tests.helpers.edges import refused
from tests.helpers.runs import tiny_config, write_tiny_data


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


class Evaluated(Trap):
    """As Trap, in words that only Python's own eval can read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({str(self.place)!r})",)


def zipped(content: Any, path: Path, **options: Any) -> None:
    torch.save(content, path, **options)


def bare(content: Any, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


def scripted(content: Any, path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


FORMS: dict[str, Callable[[Any, Path], None]] = {
    "zip": zipped,
    "zip, protocol 4": lambda content, path: zipped(content, path, pickle_protocol=4),
    "legacy": lambda content, path: zipped(content, path, _use_new_zipfile_serialization=False),
    "pickle, protocol 0": lambda content, path: bare(content, path, 0),
    "pickle, protocol 2": bare,
    "pickle, protocol 5": lambda content, path: bare(content, path, 5),
}
TRAPS = {"posix.mkdir": Trap, "eval": Evaluated}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trap", TRAPS)
def test_code_is_named_and_not_run(trap: str, form: str, mapped: bool, tmp_path: Path) -> None:
    FORMS[form]({"module": {}, "trap": TRAPS[trap](tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_restricted(tmp_path / "a.pt", mapped)
    said = str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert "a.pt holds code (" in said and trap in said and said.endswith("), not loaded")
    assert "\n" not in said and "weights_only" not in said


def test_other_files_are_named_without_advice(tmp_path: Path) -> None:
    scripted(None, tmp_path / "script.pt")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder.pt").mkdir()
    whole = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.getvalue()[:2000])
    said = {}
    for path in tmp_path.iterdir():
        with pytest.raises(CheckpointError) as caught:
            load_restricted(path, mapped=False)
        said[path.stem] = str(caught.value)
        assert "\n" not in said[path.stem] and "weights_only" not in said[path.stem], said
    assert "holds code (a TorchScript archive), not loaded" in said["script"]
    assert all(f"{name}.pt cannot be read" in said[name] for name in ("text", "list", "folder", "cut"))


POSITIONS = {
    "mp_rank_00_model_states.pt": True,
    "zero_pp_rank_0_mp_rank_01_optim_states.pt": True,
    "rng_rank_00000.pt": False,
}
"""Files of a checkpoint, and whether the tools that convert it look into them."""


def trapped(path: Path, place: Path) -> None:
    """The file ``path`` with a trap in it, and a manifest that fits it."""
    torch.save({**torch.load(path), "trap": Trap(place)}, path)
    write_manifest(path.parent)


@pytest.mark.parametrize("name", POSITIONS)
def test_tools_name_the_file(name: str, tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path / "checkpoints")
    trapped(folder / name, tmp_path / "executed")
    for tool, arguments in {
        "tools/reshard_checkpoint.py": ["--load", str(folder), "--output", "out"],
        "tools/convert_to_hf.py": ["--load", str(folder), "--output", "hf", "--skip-parity", "--tokenizer", "none"],
        "tools/generate.py": [str(folder), "--device", "cpu", "--prompt", "a"],
    }.items():
        done = run_here(tool, arguments, tmp_path)
        assert not (tmp_path / "executed").exists()
        if POSITIONS[name]:
            refused(done, 4, rf"{name} holds code \(posix\.mkdir\), not loaded")


def test_weights_of_hugging_face_s_older_format_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    config = '{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}'
    (folder / "config.json").write_text(config)
    torch.save({"trap": Trap(tmp_path / "executed")}, folder / "pytorch_model.bin")
    for tool, arguments in {
        "tools/convert_from_hf.py": ["--input", str(folder), "--output", "out"],
        "tools/generate.py": [str(folder), "--device", "cpu", "--prompt", "a"],
        "tools/evaluate.py": [str(folder), "--device", "cpu", "--data", "absent"],
    }.items():
        refused(run_here(tool, arguments, tmp_path), 4, r"pytorch_model\.bin is of an older format")
    assert not (tmp_path / "executed").exists()


def test_a_run_goes_past_code_and_refuses_it_by_name(tmp_path: Path) -> None:
    """In the weights, the optimizer's state and the random streams, with a manifest that fits."""
    data, run = write_tiny_data(tmp_path), tmp_path / "run"
    zero = {"zero_optimization": {"stage": 1}}
    config = tiny_config(
        run,
        data,
        optim={"lr_warmup_iters": 1},
        train={"train_iters": 2},
        checkpoint={"save_interval": 1},
        deepspeed=zero,
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert run_script("pretrain_sgt.py", ["--config", "run.yaml"], tmp_path).code == 0
    newest = run / "checkpoints/global_step2"
    names = (layout.model_file(0), "zero_pp_rank_0_mp_rank_00_optim_states.pt", layout.rng_file(0))
    assert not list(run.rglob("*.py")), "no script of DeepSpeed"
    shutil.copytree(newest, tmp_path / "whole")
    for name in names:
        with torch.serialization.safe_globals([]):
            content = torch.load(newest / name, weights_only=False)
        torch.save({**content, "trap": Trap(tmp_path / "executed")}, newest / name)
        write_manifest(newest)
        done = run_script("pretrain_sgt.py", ["--config", "run.yaml", "train.train_iters=1"], tmp_path)
        assert done.code == 0 and not (tmp_path / "executed").exists(), done
        assert f"{name} holds code (posix.mkdir), not loaded" in done.out and "global_step1" in done.out
        shutil.copyfile(tmp_path / "whole" / name, newest / name)
    trapped_copy = newest / names[1]
    torch.save({"trap": Trap(tmp_path / "executed")}, trapped_copy)
    write_manifest(newest)
    named = ["--config", "run.yaml", f"checkpoint.load={newest}", "logging.run_dir=other"]
    refused(run_script("pretrain_sgt.py", named, tmp_path), 4, rf"{names[1]} holds code \(posix\.mkdir\), not loaded")
    assert not (tmp_path / "executed").exists() and not list((tmp_path / "other").rglob("global_step*"))


def test_a_pickle_among_the_sample_indices_is_not_opened(tmp_path: Path) -> None:
    """NumPy takes what does not begin as its own files for a pickle, and Megatron-Core lets it."""
    np.save(tmp_path / "good.npy", np.arange(3))
    check_indices(str(tmp_path))
    (tmp_path / "document_index.npy").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(DataError, match=r"document_index\.npy is no NumPy array, not loaded; delete .* built again"):
        check_indices(str(tmp_path))
    np.save(tmp_path / "document_index.npy", np.array([Trap(tmp_path / "executed")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):  # as Megatron-Core opens it
        np.load(tmp_path / "document_index.npy", allow_pickle=True, mmap_mode="r")
    assert not (tmp_path / "executed").exists()


def test_a_run_does_not_open_a_pickle_among_its_sample_indices(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    config = tiny_config(tmp_path / "run", data, optim={"lr_warmup_iters": 1}, train={"train_iters": 1})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert run_script("pretrain_sgt.py", ["--config", "run.yaml"], tmp_path).code == 0
    for path in Path(f"{data}_cache").rglob("*.npy"):
        path.write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    refused(
        run_script("pretrain_sgt.py", ["--config", "run.yaml"], tmp_path), 3, r"\.npy is no NumPy array, not loaded"
    )
    assert not (tmp_path / "executed").exists()
