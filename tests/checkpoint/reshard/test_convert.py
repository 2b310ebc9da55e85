from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.reshard.convert import convert, weights_of
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, QUANTITIES
from megatron_sgt.checkpoint.reshard.source import open_source
from megatron_sgt.errors import CheckpointError, LeaseError
from megatron_sgt.lease import inside
from tests.helpers.deepspeed_files import (
    STEP,
    State,
    counters,
    odd_config,
    random_state,
    write_checkpoint,
    write_manifest,
)
from tests.helpers.leases import held_by_another

MODELS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "grouped": {"num_query_groups": 2, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "gelu": {
        "activation": "gelu",
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "qk_layernorm": False,
    },
}


Pipeline = tuple[int, tuple[int, ...]] | None
"""Stages, and the layers of every chunk."""


def read_all(folder: Path, quantities: Sequence[str] = QUANTITIES) -> State:
    return {
        quantity: {n: t for file in folder.glob(f"{quantity}-*") for n, t in load_file(file).items()}
        for quantity in quantities
    }


def same(one: State, other: State) -> bool:
    return all(
        one[quantity].keys() == other[quantity].keys()
        and all(torch.equal(tensor, other[quantity][name]) for name, tensor in one[quantity].items())
        for quantity in QUANTITIES
    )


@pytest.mark.parametrize(
    ("where", "pipeline"),
    [
        *((where, None) for where in [(2, 2, 0), (2, 3, 1), (1, 2, 2), (2, 2, 3), (1, 3, 3)]),
        ((2, 1, 0), (2, (1, 1))),
        ((1, 2, 1), (2, (1, 1))),
    ],
)
def test_an_average_of_the_weights_is_one_more_quantity(
    where: tuple[int, int, int], pipeline: Pipeline, tmp_path: Path
) -> None:
    config = odd_config()
    state = random_state(config, averaged=True)
    source = write_checkpoint(tmp_path / "from", config, state, where, pipeline=pipeline)
    if where[2] < 3:  # else every data-parallel rank has a model file, of which the first one's alone is read
        written_under = layout.read_json(source / layout.STATE_FILE)["layout"]
        assert layout.expected_files(written_under, averaged=True) == {*layout.file_sizes(source)}
    folder, *_ = convert(source, tmp_path / "to")
    found = read_all(folder, [*QUANTITIES, AVERAGE])
    assert same(found, state)
    assert found[AVERAGE].keys() == state[AVERAGE].keys()
    assert all(torch.equal(tensor, state[AVERAGE][name]) for name, tensor in found[AVERAGE].items())
    assert LayoutFreeReader(folder).quantities == (*QUANTITIES, AVERAGE)


@pytest.mark.parametrize("where", [(1, 1, 0), (1, 2, 1), (1, 2, 3)])
def test_an_average_of_other_weights_is_refused(where: tuple[int, int, int], tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path, config, random_state(config, averaged=True), where)
    file = folder / layout.average_file({"zero_stage": where[2]}, 0, where[1] - 1)
    for wrong in ([], [tensor[:-1] for tensor in torch.load(file)["average"]]):
        torch.save({"average": wrong}, file)
        with pytest.raises(CheckpointError, match=f"{file.name} holds no average of these weights"):
            open_source(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
        open_source(folder)


def test_a_checkpoint_without_an_average_gets_none(tmp_path: Path) -> None:
    config = odd_config()
    folder, *_ = convert(write_checkpoint(tmp_path / "from", config, random_state(config), (1, 2, 1)), tmp_path / "to")
    assert LayoutFreeReader(folder).quantities == QUANTITIES and not list(folder.glob("ema*"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("where", "pipeline"),
    [
        *((where, None) for where in [(1, 1, 0), (2, 2, 0), (2, 3, 1), (1, 2, 2), (2, 2, 3), (1, 3, 3)]),
        ((1, 1, 0), (2, (1, 1))),
        ((2, 2, 1), (2, (1, 1))),
    ],
)
def test_the_merged_state_is_the_one_that_was_sharded(
    where: tuple[int, int, int], pipeline: Pipeline, model: str, tmp_path: Path
) -> None:
    """Tied weights lie on the first stage of a pipeline alone."""
    config = odd_config(**MODELS[model])
    state = random_state(config)
    folder = write_checkpoint(tmp_path / "from", config, state, where, "matrices", pipeline)
    final, size, drift = convert(folder, tmp_path / "to")
    assert final == layout.resolve(tmp_path / "to") == tmp_path / "to" / f"global_step{STEP}"
    assert same(read_all(final), state)
    assert drift == 0.0
    manifest.verify_sizes(final)
    assert size == sum(layout.file_sizes(final).values())
    ranks = where[0] * where[1] * (1 if pipeline is None else pipeline[0])
    assert len(list(final.glob("rng_rank_*.pt"))) == ranks
    saved = layout.read_json(final / layout.STATE_FILE)
    assert saved["layout"] is None and saved["trainer"] == counters(STEP)
    assert saved["layout_free"] == {
        "version": 1,
        "source_layout": layout.read_json(folder / layout.STATE_FILE)["layout"],
        "optimizer_step": STEP,
        "loss_scale": None,
    }


def test_many_processes_write_the_same(tmp_path: Path) -> None:
    config = odd_config()
    state = random_state(config)
    folder = write_checkpoint(tmp_path / "from", config, state, (2, 1, 1))
    final, *_ = convert(folder, tmp_path / "to", processes=2)
    assert same(read_all(final), state)
    assert len(list(final.glob("weights-*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_parts_cover_every_parameter_once_and_are_balanced(parts: int, tmp_path: Path) -> None:
    config = odd_config(num_layers=8)
    source = open_source(write_checkpoint(tmp_path, config, random_state(config), (1, 1, 0)))
    chosen = [weights_of(source, part, parts) for part in range(parts)]
    assert tuple(weight for part in chosen for weight in part) == weights(config.model)
    sizes = [sum(source.ranks[0][0].read(f"gpt.{e.megatron}", "weights").numel() for e in part) for part in chosen]
    largest = max(tensor.numel() for tensor in random_state(config)["weights"].values()) * 3  # q, k and v are one
    assert max(sizes) <= sum(sizes) / parts + largest


@pytest.mark.parametrize(("pipeline", "rank"), [(None, 1), ((2, (1, 1)), 3)])
def test_copies_that_differ_are_told(pipeline: Pipeline, rank: int, tmp_path: Path) -> None:
    """Copies are those of tensor-parallel ranks of one stage."""
    config = odd_config()
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (2, 1, 0), pipeline=pipeline)
    file = folder / layout.model_file(rank)
    content = torch.load(file)
    content["module"]["gpt.decoder.final_layernorm.weight"][3] += 0.25
    torch.save(content, file)
    write_manifest(folder)
    assert convert(folder, tmp_path / "to")[2] == pytest.approx(0.25, abs=1e-6)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (1, 1, 0))
    before = layout.file_sizes(folder)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(folder, tmp_path / "from")
    assert layout.file_sizes(folder) == before


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (1, 2, 1))
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is missing"):
        convert(folder, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_an_interrupted_conversion_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (1, 1, 0))

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(layout, "write_json", full)
        with pytest.raises(CheckpointError, match=r"cannot be written.*No space left"):
            convert(folder, tmp_path / "to")
    assert layout.finished_tags(tmp_path / "to") == []
    convert(folder, tmp_path / "to")  # over what the first attempt has left
    assert layout.finished_tags(tmp_path / "to") == [f"global_step{STEP}"]
    assert [path.name for path in (tmp_path / "to").glob("*.tmp")] == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (1, 1, 0))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"file/global_step{STEP}\.tmp cannot be made: .*Not a directory"):
        convert(folder, tmp_path / "file")


def test_what_the_run_skips_of_its_data_comes_along(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "from", odd_config(), random_state(odd_config()), (1, 1, 0))
    (tmp_path / "from" / layout.PASSED_FILE).write_text('{"ranges": [[8, 16]]}', encoding="utf-8")
    convert(folder, tmp_path / "to")
    assert layout.read_json(tmp_path / "to" / layout.PASSED_FILE) == {"ranges": [[8, 16]]}


def test_a_folder_that_a_run_writes_into_is_left_alone(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (1, 1, 0))
    with (
        held_by_another(inside(tmp_path / "to")) as run,
        pytest.raises(LeaseError, match=rf"pid {run.pid}\b.*--output"),
    ):
        convert(folder, tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["writer.json"]
    convert(folder, tmp_path / "to")
    assert not inside(tmp_path / "to").exists()
