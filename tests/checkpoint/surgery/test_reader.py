"""A grown checkpoint that lies nowhere: of every form, cut into every layout, in little memory, into an engine."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader, ShardReader
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, MOMENTS, QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.surgery.offline import grow_checkpoint
from megatron_sgt.checkpoint.surgery.reader import GrownReader, open_any
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.optimizer import Carried
from tests.helpers.deepspeed_files import STEP, State, odd_config, random_state, rank_state, write_checkpoint
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference_growth import in_order
from tests.helpers.resharding import look_at_state

MSG = {"hidden_size": 30, "ffn_hidden_size": 26, "num_attention_heads": 8, "num_layers": 3}


M_MMAP_THRESHOLD = -3
"""Of the C library's malloc.h."""


def reader_of(folder: Path, name: str, options: dict[str, Any], carried: Carried) -> tuple[GrownReader, Config]:
    """What ``folder`` grows into, and its configuration."""
    opened = open_any(folder)
    growth = OPERATORS[name](opened.config.model, options)
    config = opened.config.model_copy(update={"model": growth.new})
    return GrownReader(opened.tensors, growth, carried, seed=3, stage=1), config


def read_all(reader: GrownReader, config: Config) -> State:
    return {
        quantity: {n: t for weight in weights(config.model) for n, t in reader.whole(weight, quantity).items()}
        for quantity in reader.quantities
    }


@pytest.mark.parametrize("where", [(1, 1, 0), (2, 2, 1), (1, 2, 2), (2, 1, 3), None])
def test_every_form_of_a_checkpoint_grows_into_the_same(where: tuple[int, int, int] | None, tmp_path: Path) -> None:
    config = odd_config()
    state = random_state(config)
    folder = write_checkpoint(tmp_path / "from", config, state, where or (1, 1, 0))
    folder = folder if where else convert(folder, tmp_path / "free")[0]
    found = read_all(*reader_of(folder, "midas", {"block_size": 1}, Carried(STEP, "copy")))
    for quantity in QUANTITIES:
        expected = in_order(state[quantity], [0, 0, 1])
        assert found[quantity].keys() == expected.keys()
        assert all(torch.equal(found[quantity][name], expected[name]) for name in expected)
    wider = read_all(*reader_of(folder, "msg", MSG, Carried(STEP, "seeded")))
    stored = write_checkpoint(tmp_path / "plain", config, state, (1, 1, 0))
    again = read_all(*reader_of(stored, "msg", MSG, Carried(STEP, "seeded")))
    assert all(torch.equal(wider[q][name], again[q][name]) for q in QUANTITIES for name in again[q])
    fresh, _ = reader_of(folder, "msg", MSG, Carried(0, "fresh"))
    assert fresh.quantities == (WEIGHTS,)


@pytest.mark.parametrize("where", [(2, 2, 1), None])
def test_a_model_grows_from_the_average_of_its_weights(where: tuple[int, int, int] | None, tmp_path: Path) -> None:
    config = odd_config({"train": {"ema_decay": 0.75}})
    state = random_state(config, averaged=True)
    folder = write_checkpoint(tmp_path / "from", config, state, where or (1, 1, 0))
    opened = open_any(folder if where else convert(folder, tmp_path / "free")[0])
    growth = OPERATORS["auto_prog"](config.model, {"num_layers": 3})
    found = {}
    for made_of in (WEIGHTS, AVERAGE):
        reader = GrownReader(opened.tensors, growth, Carried(STEP, "copy"), seed=3, stage=1, made_of=made_of)
        found[made_of] = read_all(reader, config.model_copy(update={"model": growth.new}))
    assert set(found[AVERAGE]) == {*QUANTITIES, AVERAGE}
    for quantity, source in [(WEIGHTS, AVERAGE), (AVERAGE, AVERAGE), *((moment, moment) for moment in MOMENTS)]:
        expected = in_order(state[source], [0, 1, 1])
        assert all(torch.equal(found[AVERAGE][quantity][name], expected[name]) for name in expected)
    assert all(torch.equal(t, in_order(state[WEIGHTS], [0, 1, 1])[name]) for name, t in found[WEIGHTS][WEIGHTS].items())


@pytest.mark.parametrize("name", OPERATORS)
def test_from_an_average_equal_to_the_weights_comes_the_same(name: str, tmp_path: Path) -> None:
    config = odd_config({"train": {"ema_decay": 0.75}})
    state = random_state(config, averaged=True)
    state[AVERAGE] = {key: tensor.clone() for key, tensor in state[WEIGHTS].items()}
    opened = open_any(write_checkpoint(tmp_path, config, state, (1, 1, 0)))
    options = {"auto_prog": {"num_layers": 4}, "msg": MSG, "g_stack": {}, "compound_grow": {}}
    growth = OPERATORS[name](config.model, options.get(name, {"block_size": 2}))
    grown = config.model_copy(update={"model": growth.new})
    one, other = (
        read_all(GrownReader(opened.tensors, growth, Carried(STEP, "scaled"), 3, 1, made_of), grown)
        for made_of in (WEIGHTS, AVERAGE)
    )
    assert all(torch.equal(one[q][key], other[q][key]) for q in (*QUANTITIES, AVERAGE) for key in one[q])


def test_a_checkpoint_without_an_average_cannot_grow_from_it(tmp_path: Path) -> None:
    opened = open_any(write_checkpoint(tmp_path, odd_config(), random_state(odd_config()), (1, 1, 0)))
    growth = OPERATORS["g_stack"](odd_config().model, {})
    with pytest.raises(CheckpointError, match=r"holds no average of the weights .* train\.ema_decay"):
        GrownReader(opened.tensors, growth, Carried(0, "fresh"), 3, 1, AVERAGE)


def test_shards_are_those_of_the_whole(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, odd_config(), random_state(odd_config()), (2, 1, 1))
    reader, config = reader_of(folder, "msg", MSG, Carried(STEP, "scaled"))
    state = read_all(reader, config)
    for tp_rank in range(2):
        expected = rank_state(config, state, 2, tp_rank)
        for weight in weights(config.model):
            for quantity in QUANTITIES:
                shard = reader.shard(weight, quantity, config.model, 2, tp_rank)
                assert torch.equal(shard, expected[quantity][f"gpt.{weight.megatron}"])
    with pytest.raises(
        CheckpointError, match=r"the grown model has no embedding\.word_embeddings\.weight of the shapes"
    ):
        reader.shard(weights(odd_config().model)[0], WEIGHTS, odd_config().model)


def test_a_checkpoint_of_another_shape_is_seen_before_anything_is_read(tmp_path: Path) -> None:
    folder, *_ = convert(
        write_checkpoint(tmp_path / "a", odd_config(), random_state(odd_config()), (1, 1, 0)), tmp_path
    )
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("ffn_hidden_size: 20", "ffn_hidden_size: 24"))
    with pytest.raises(CheckpointError, match=r"has the shape \[20, 24\], this model's has \[24, 24\]"):
        open_any(folder)
    (folder / "config.yaml").write_text(text.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(CheckpointError, match=r"holds no weights of model\.layers\.2\."):
        open_any(folder)


def load_twice(info: RankInfo, config: Config, source: Path, written: Path) -> list[dict[str, Any]]:
    """The states of an engine that has read the grown checkpoint in passing, and from disk."""
    carried = Carried(STEP, "copy")
    readers: list[ShardReader] = [reader_of(source, "g_stack", {"factor": 2}, carried)[0], LayoutFreeReader(written)]
    return [look_at_state(info, config, reader, STEP) for reader in readers]


@pytest.mark.parametrize("where", [(1, 2, 1), (2, 1, 3)])
def test_an_engine_reads_the_same_in_passing_as_from_disk(where: tuple[int, int, int], tmp_path: Path) -> None:
    tp_size, dp_size, stage = where
    state = random_state(odd_config())
    source = write_checkpoint(tmp_path / "from", odd_config(), state, (2, 1, 1))
    done = grow_checkpoint(source, tmp_path / "to", OPERATORS["g_stack"], {"factor": 2}, "copy", "continue", seed=3)
    layout = {"tensor_model_parallel_size": tp_size, "zero_stage": stage, "device": "cpu"}
    config = odd_config({"parallel": layout, "train": {"micro_batch_size": 1, "global_batch_size": 2}}, num_layers=4)
    expected = {quantity: in_order(state[quantity], [0, 1, 0, 1]) for quantity in QUANTITIES}
    for tp_rank, seen in enumerate(run_on_ranks(tp_size * dp_size, load_twice, config, source, done.folder)):
        shards = rank_state(config, expected, tp_size, tp_rank if tp_size > 1 else 0)
        for found in seen:
            for quantity in QUANTITIES:
                assert all(torch.equal(found[quantity][name], tensor) for name, tensor in shards[quantity].items())


def anonymous() -> int:
    """Bytes of this process's memory that is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def peak_of_reading(info: RankInfo, folder: Path, name: str, options: dict[str, Any]) -> tuple[int, int]:
    """The most memory beyond that of an idle process, and the largest new tensor with moments."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed is gone at once
    reader, config = reader_of(folder, name, options, Carried(STEP, "seeded"))
    table = sorted(weights(config.model), key=lambda weight: -weight.elements)
    for quantity in QUANTITIES:  # what libraries allocate once
        reader.whole(table[-1], quantity)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.0005)

    watching = threading.Thread(target=watch)
    watching.start()
    for weight in table[:3]:
        for quantity in QUANTITIES:
            reader.whole(weight, quantity)
    done.set()
    watching.join()
    return peak[0] - before, 3 * 4 * table[0].elements


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    config = odd_config(hidden_size=192, vocab_size=16000, ffn_hidden_size=4000, num_layers=1)
    folder = write_checkpoint(tmp_path / "from", config, random_state(config), (1, 1, 0))
    folder, *_ = convert(folder, tmp_path / "free")
    options = {"hidden_size": 256, "ffn_hidden_size": 8000}
    ((peak, largest),) = run_on_ranks(1, peak_of_reading, folder, "msg", options)
    assert largest == 3 * 4 * 16000 * 256
    assert 0.2 * largest < peak <= 1.2 * largest
