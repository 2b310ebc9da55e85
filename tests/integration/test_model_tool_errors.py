"""Mistakes with the tools for models: one clear message, the documented exit code, nothing half-made left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import grown_run
from tests.helpers.commands import run_here, snapshot
from tests.helpers.hf_folders import save_hf_model
from tests.helpers.tokenizers import write_hf_tokenizer, write_sentencepiece


def nothing(folder: Path) -> None:
    """No damage."""


def lose_shard(folder: Path) -> None:
    next((folder / "llama").glob("model-00002-*")).unlink()


def cut_shard(folder: Path) -> None:
    file = next((folder / "llama").glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-3])


def half_write(folder: Path) -> None:
    (folder / "run" / "global_step18" / "manifest.json").unlink()


def lose_file(folder: Path) -> None:
    next((folder / "run" / "global_step18").glob("*model_states.pt")).unlink()


def give_wrong_tokenizer(folder: Path) -> None:
    write_hf_tokenizer(folder / "llama")


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "hf" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "hf" / "model.safetensors")


def make_moe(folder: Path) -> None:
    config = folder / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mixtral"}))


@dataclass(frozen=True)
class Mistake:
    """`tools/<tool>.py arguments` after ``damage``, its exit code, and what stderr must hold."""

    tool: str
    arguments: str
    code: int
    says: tuple[str, ...]
    damage: Callable[[Path], None] = nothing


MISTAKES = (
    Mistake("convert_from_hf", "--input llama", 2, ("required: --output",)),
    Mistake("convert_from_hf", "--input llama --output new --config no.yaml", 2, ("no such file: no.yaml",)),
    Mistake("convert_from_hf", "--input llama --output new --config a.yaml --seq-length 8", 2, ("--config",)),
    Mistake("convert_from_hf", "--input nowhere --output new", 4, ("nowhere is no Hugging Face model folder",)),
    Mistake("convert_from_hf", "--input run --output new", 4, ("run is no Hugging Face model folder",)),
    Mistake("convert_from_hf", "--input llama --output run", 4, ("run holds checkpoints already",)),
    Mistake("convert_from_hf", "--input llama --output sp.model/new", 4, ("sp.model/new",)),
    Mistake("convert_from_hf", "--input llama --output new", 4, ("model-00002-of", "is missing"), lose_shard),
    Mistake("convert_from_hf", "--input llama --output new", 4, ("model-00002-of", "cut off"), cut_shard),
    Mistake("convert_from_hf", "--input llama --output new", 4, ("'mixtral'", "mixture of experts"), make_moe),
    Mistake("convert_from_hf", "--input hf --output new", 4, ("lack 1 tensors", "model.norm.weight"), drop_tensor),
    Mistake("convert_from_hf", "--input llama --output new", 4, ("280 ids, the model knows 96",), give_wrong_tokenizer),
    Mistake("generate", "run", 3, ("no prompts", "--prompt-file")),
    Mistake("generate", "run --prompt-file no.txt", 3, ("cannot read no.txt: No such file",)),
    Mistake("generate", "run --prompt the --max-new-tokens 99", 3, ("--max-new-tokens 99", "48")),
    Mistake("generate", "run --prompt the --greedy --num-samples 2", 2, ("--num-samples 2",)),
    Mistake("generate", "run --prompt the --top-p 7", 2, ("--top-p 7.0",)),
    Mistake("generate", "run --prompt the --step 5", 4, ("no checkpoint of step 5", "global_step9, global_step18")),
    Mistake("generate", "run --prompt the --tokenizer other.model", 3, ("310 ids", "300")),
    Mistake("generate", "run --prompt the --tokenizer no.model", 3, ("tokenizer no.model does not exist",)),
    Mistake("generate", "llama --prompt the", 3, ("llama has no tokenizer", "--tokenizer")),
    Mistake("generate", "nowhere --prompt the", 4, ("no checkpoint at nowhere",)),
    Mistake("generate", "llama --prompt the", 4, ("model-00002-of", "is missing"), lose_shard),
    Mistake("generate", "hf --prompt the", 4, ("1 missing keys", "model.norm.weight"), drop_tensor),
    Mistake("generate", "run --prompt the", 4, ("global_step18", "not a whole checkpoint"), half_write),
    Mistake("generate", "run --prompt the", 4, ("model_states.pt is missing",), lose_file),
    Mistake("evaluate", "hf", 2, ("names no data set to measure on", "--data PREFIX")),
    Mistake("evaluate", "hf --data no", 3, ("no indexed data set at no",)),
    Mistake("evaluate", "hf --data words --part test --split 90,10,0", 3, ("the test split", "no whole sample")),
    Mistake("evaluate", "run --data words --tokenizer other.model", 3, ("310 ids",)),
    Mistake("evaluate", "hf --data words --tokenizer sp.model", 3, ("give a folder with a tokenizer.json",)),
    Mistake("evaluate", "llama --data words", 3, ("token id", "96 ids")),
    Mistake("evaluate", "run", 4, ("model_states.pt is missing",), lose_file),
    Mistake("evaluate", "llama --tasks anything", 3, ("no tokenizer",)),
    Mistake("inspect_checkpoint", "nowhere", 4, ("no checkpoint at nowhere",)),
    Mistake("inspect_checkpoint", "llama", 4, ("no whole checkpoint at llama",)),
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints, its export, its data; a Llama in shards without a tokenizer; another tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "template"
    shutil.copytree(grown_run.checkpoints(), folder / "run")
    shutil.copytree(grown_run.export(), folder / "hf")
    for suffix in (".bin", ".idx", ".json"):
        shutil.copyfile(grown_run.data_prefix() + suffix, folder / f"words{suffix}")
    save_hf_model(folder / "llama", "llama", shard_size="20KB")
    shutil.copyfile(grown_run.folder() / "sp.model", folder / "sp.model")
    write_sentencepiece(folder / "other.model", 310)
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.tool} {m.arguments} {m.damage.__name__}")
def test_mistake(mistake: Mistake, template: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "user"))
    mistake.damage(folder)
    before = snapshot(folder)
    done = run_here(f"tools/{mistake.tool}.py", mistake.arguments.split(), folder)
    assert done.code == mistake.code, done.err
    assert done.err.count("error: ") == 1 and done.out == "", done.err
    missing = [word for word in mistake.says if word not in done.err]
    assert not missing, f"{missing} not in: {done.err}"
    assert snapshot(folder) == before
