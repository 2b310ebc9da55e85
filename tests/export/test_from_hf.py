"""Models made by transformers, imported: the same logits and the same first loss, every bit of every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgt.checkpoint.find import check_checkpoint
from megatron_sgt.checkpoint.load import load_checkpoint
from megatron_sgt.checkpoint.reshard.layout_free import file_name
from megatron_sgt.config import Config, load_config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.errors import CheckpointError, LeaseError
from megatron_sgt.export import from_hf
from megatron_sgt.export.forms import FORMS, SERVING
from megatron_sgt.export.from_hf import import_model
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.lease import inside
from tests.helpers.commands import snapshot
from tests.helpers.exports import export_config, write_run
from tests.helpers.hf_folders import FAMILIES, VOCAB_SIZE, save_hf_model
from tests.helpers.leases import held_by_another
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, reported, write_tiny_data
from tests.helpers.tokenizers import write_hf_tokenizer

DTYPES = {"mistral": torch.bfloat16, "qwen2": torch.float16}


def run_of(root: Path, *overrides: str) -> Config:
    values = ("parallel.device=cpu", "train.precision=fp32", "data.data_path=[]", *overrides)
    return load_config(root / "run.yaml", values)


def imported_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / file_name("weights", 0, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_bit_arrives(name: str, tmp_path: Path) -> None:
    model = save_hf_model(tmp_path / "hf", name, DTYPES.get(name, torch.float32), shard_size="20KB")
    done = import_model(tmp_path / "hf", tmp_path / "root")
    assert (done.padding_rows, done.model.model_type) == (0, model.config.model_type)
    found, expected = imported_weights(done.folder), load_files(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key].to(tensor.dtype), tensor), key


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_both_forms_of_a_model_come_in_as_the_same(tmp_path: Path) -> None:
    """And the form for serving, exported again, is the same bytes."""
    write_run(tmp_path / "ckpt", export_config("grouped_query"))
    options = ExportOptions(dtype="fp32", form=SERVING)
    done = {}
    for form in FORMS.values():
        folder = tmp_path / form.name
        export_checkpoint(tmp_path / "ckpt", folder, options=ExportOptions(dtype="fp32", form=form))
        done[form.name] = import_model(folder, tmp_path / f"{form.name}_root")
    one, other = done.values()
    assert one.model.fields == other.model.fields and one.model.loops == other.model.loops
    weights = [imported_weights(each.folder) for each in done.values()]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    again = export_checkpoint(done[SERVING.name].folder.parent, tmp_path / "again", options=options)
    names = ["model.safetensors", *SERVING.files]
    assert all((again.folder / n).read_bytes() == (tmp_path / "serving" / n).read_bytes() for n in names)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (again.folder, tmp_path / "serving")]
    assert configs[0]["sgt_loops"] == configs[1]["sgt_loops"] and configs[0]["num_hidden_layers"] == 7


def logits_on_rank(info: RankInfo, config: Config, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The project's logits [B, S, V] of a checkpoint, in fp32; for ``run_on_ranks``."""
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    load_checkpoint(folder, check_checkpoint(folder, config), config, runtime.engine, groups)
    return runtime.model.eval().logits(tokens)


@pytest.mark.parametrize(
    ("name", "tp_size"), [*((name, 1) for name in FAMILIES), ("llama_tied_biased", 2), ("qwen3", 2), ("olmo2", 2)]
)
def test_the_project_computes_the_same_logits(name: str, tp_size: int, tmp_path: Path) -> None:
    model = save_hf_model(tmp_path / "hf", name)
    done = import_model(tmp_path / "hf", tmp_path / "root")
    tokens = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    config = run_of(tmp_path / "root", f"parallel.tensor_model_parallel_size={tp_size}")
    for found in run_on_ranks(tp_size, logits_on_rank, config, done.folder, tokens):
        assert (found[..., :VOCAB_SIZE] - expected).abs().max() <= 1e-4
        assert expected.std() > 0.1


@pytest.mark.parametrize("tp_size", [1, 2])
def test_training_begins_at_the_loss_of_transformers(tp_size: int, tmp_path: Path) -> None:
    model = save_hf_model(tmp_path / "hf", "qwen3")
    import_model(tmp_path / "hf", tmp_path / "root")
    config = load_config(
        tmp_path / "root" / "run.yaml",
        [
            f"data.data_path={write_tiny_data(tmp_path)}",
            f"logging.run_dir={tmp_path / 'run'}",
            f"parallel.tensor_model_parallel_size={tp_size}",
            "parallel.device=cpu", "model.seq_length=16", "train.global_batch_size=4", "train.train_iters=2",
            "logging.log_interval=1", "logging.progress_bar=off", "growth.first_selection_step=1",
            "optim.lr_warmup_iters=0",
        ],
    )  # fmt: skip
    run_on_ranks(tp_size, pretrain, config)
    first, second = reported(tmp_path / "run", "train")
    samples = [build_datasets(config, None)[0][index] for index in range(4)]
    with torch.no_grad():
        logits = model(torch.stack([sample["tokens"] for sample in samples])).logits
    labels = torch.stack([sample["labels"] for sample in samples])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert first["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert sum(second["loop_depth"]) == 1, "growth begins with the run"


def test_a_vocabulary_without_a_common_divisor_is_padded(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama", vocab_size=97)
    done = import_model(tmp_path / "hf", tmp_path / "root", padding=50)
    weights, original = imported_weights(done.folder), load_files(tmp_path / "hf")
    assert done.padding_rows == 3
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights[name][:97], original[name]) and not weights[name][97:].any()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama", vocab_size=288)
    write_hf_tokenizer(tmp_path / "hf")
    done = import_model(tmp_path / "hf", tmp_path / "root")
    assert done.config.data.tokenizer is not None
    assert done.config.data.tokenizer.model == str(tmp_path / "root" / "tokenizer")
    assert (tmp_path / "root" / "tokenizer" / "tokenizer.json").is_file()


def add(name: str, like: str | None = None, scale: float = 1.0) -> Any:
    """A change of the weights: one more tensor, ``scale`` times the one of the name ``like``."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = torch.ones(4) if like is None else scale * weights[like]

    return change


@pytest.mark.parametrize(
    ("name", "settings", "change", "says"),
    [
        ("llama", {}, add("model.layers.0.self_attn.q_norm.weight"), "1 tensors unknown to this model"),
        (
            "llama",
            {},
            lambda w: w.pop("model.norm.weight"),
            "lack 1 tensors of this model: model.norm.weight",
        ),
        (
            "llama",
            {"head_dim": 12},
            lambda w: None,
            "q_proj.weight has the shape [32, 32], this model's has [48, 32]",
        ),
        ("llama", {"vocab_size": 90}, lambda w: None, "embed_tokens.weight has the shape [96, 32]"),
        ("qwen3", {}, add("lm_head.weight", "model.embed_tokens.weight", 2.0), "lm_head.weight differs"),
        ("llama", {}, add("model.layers.1.self_attn.rotary_emb.inv_freq"), "differs from the frequencies"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    name: str, settings: dict[str, Any], change: Any, says: str, tmp_path: Path
) -> None:
    save_hf_model(tmp_path / "hf", name)
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({key: tensor.clone() for key, tensor in weights.items()}, file)
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(CheckpointError) as refused:
        import_model(tmp_path / "hf", tmp_path / "root")
    assert says in str(refused.value) and not (tmp_path / "root").exists()


def test_what_older_versions_stored_twice_is_compared_and_left_out(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "qwen3")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    size = torch.arange(0, 16, 2).float()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = (10000.0 ** (-size / 16)).bfloat16()
    save_file(weights, file)
    done = import_model(tmp_path / "hf", tmp_path / "root")
    assert "lm_head.weight" not in imported_weights(done.folder)


def test_nothing_is_left_of_an_import_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf_model(tmp_path / "hf", "llama", vocab_size=288)
    write_hf_tokenizer(tmp_path / "hf")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(from_hf, "replace_text", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
        import_model(tmp_path / "hf", tmp_path / "root")
    assert snapshot(tmp_path) == before


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama")
    write_hf_tokenizer(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="the model knows 96"):
        import_model(tmp_path / "hf", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_folder_with_checkpoints_is_left_alone(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama")
    import_model(tmp_path / "hf", tmp_path / "root")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        import_model(tmp_path / "hf", tmp_path / "root")
    assert snapshot(tmp_path) == before


def test_an_import_into_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "qwen3")
    with (
        held_by_another(inside(tmp_path / "root")) as run,
        pytest.raises(LeaseError, match=rf"pid {run.pid}\b.*--output"),
    ):
        import_model(tmp_path / "hf", tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["writer.json"]
