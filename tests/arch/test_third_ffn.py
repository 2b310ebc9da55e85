"""A kind of feed-forward layer that the package does not know: an ungated squared ReLU (arXiv 2109.08668).

All that it takes is in this file: the record RELU2, the module MODULE and one registration. The kind is trained,
planned, saved, resharded, exported and imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sgt import extensions
from megatron_sgt.arch.ffn import FFNKind
from megatron_sgt.arch.kernels import CPU
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.architecture import plain_architecture
from megatron_sgt.export.hf.families import read_model
from megatron_sgt.export.parity import check_parity
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, begin_step
from megatron_sgt.model.mlp import FFNModule, mlp_spec
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.memory import activation_memory
from megatron_sgt.planning.parameters import parameter_count
from tests.helpers.flops import flop_counter
from tests.helpers.live_memory import LiveMemory
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, tiny_config, write_tiny_data
from tests.helpers.single import SMALL, random_batch, single_model, small_config


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


MODULE = FFNModule(mlp_spec(), squared_relu)
RELU2 = FFNKind(f"{__name__}:MODULE", gated=False, hidden_act="relu2", saved=2)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    extensions.register("ffn", "relu2", RELU2)
    yield
    extensions.unregister("ffn", "relu2")


def train(info: RankInfo, config: Config) -> None:
    extensions.register("ffn", "relu2", RELU2)
    PretrainingRun(config, info).train()


def relu2_config(folder: Path, data: str, tp_size: int, steps: int, load: Path | None = None) -> Config:
    return tiny_config(
        folder,
        data,
        model={"activation": "relu2", "add_bias_linear": True},
        train={"train_iters": steps, "eval_interval": 100},
        optim={"lr_decay_iters": 12},
        parallel={"tensor_model_parallel_size": tp_size, "sequence_parallel": tp_size > 1},
        checkpoint={"load": None if load is None else str(load)},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "one" on one rank and "two" on two tensor-parallel ranks, to step 8; "on" takes the latter to 12 on one rank."""
    root = tmp_path_factory.mktemp("relu2")
    data = write_tiny_data(root)
    run_on_ranks(1, train, relu2_config(root / "one", data, 1, 12))
    run_on_ranks(2, train, relu2_config(root / "two", data, 2, 8))
    run_on_ranks(1, train, relu2_config(root / "on", data, 1, 12, root / "two" / "checkpoints"))
    return root


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in measured_steps(folder)}


def test_it_trains_under_every_layout_and_continues_under_another(runs: Path) -> None:
    one, two, on = (losses(runs / name) for name in ("one", "two", "on"))
    assert list(two) == list(range(1, 9)) and list(on) == list(range(9, 13))
    assert one == pytest.approx(two | on, abs=2e-4)
    assert min(one.values()) < one[1] - 0.05


def test_the_checkpoint_is_resharded_and_exported(runs: Path, tmp_path: Path) -> None:
    """The exported model computes what the project's own does; read back, it is of the same kind."""
    folder, *_ = convert(next((runs / "two" / "checkpoints").glob("global_step8")), tmp_path / "free")
    options = ExportOptions(dtype="fp32")
    direct = export_checkpoint(runs / "two" / "checkpoints", tmp_path / "direct", options=options)
    resharded = export_checkpoint(folder, tmp_path / "resharded", options=options)
    weights = [(export.folder / "model.safetensors").read_bytes() for export in (direct, resharded)]
    assert weights[0] == weights[1]
    parity = check_parity(resharded, new_tokens=8)
    assert parity.passed, [check.line() for check in parity.checks]
    assert read_model(resharded.folder).fields["activation"] == "relu2"


def test_a_plain_decoder_is_not_mistaken_for_it() -> None:
    """transformers' Llama has a gate."""
    model = ModelConfig.model_validate({**SMALL["model"], "activation": "relu2"})
    assert plain_architecture(model, LoopPlan.empty(4))[0] is None


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_plan_counts_what_is_built(recompute: str) -> None:
    config = small_config(model={"activation": "relu2"}, train={"recompute_granularity": recompute})
    model = single_model(config)
    assert parameter_count(config.model) == sum(p.numel() for p in model.parameters())
    plan = LoopPlan(4, ((2, LayerPlan(1, (0, 3))), (3, LayerPlan(block_loops=1))))
    apply_plan(model, plan)
    batch = random_batch(config)
    if recompute == "none":
        with flop_counter() as counter:
            model(**batch).backward()
        assert counter.get_total_flops() == step_flops(config.model, plan, 2).executed
    model(**batch)
    begin_step(model)
    with LiveMemory() as memory:
        loss = model(**batch)
    assert activation_memory(config, plan, "fp32", CPU).saved == pytest.approx(memory.live(), rel=0.05)
    del loss


def test_the_layer_is_the_formula() -> None:
    config = small_config(model={"activation": "relu2"})
    mlp = single_model(config).gpt.decoder.layers[1].mlp
    x = torch.randn(5, 2, config.model.hidden_size)
    expected = F.relu(x @ mlp.linear_fc1.weight.T) ** 2 @ mlp.linear_fc2.weight.T
    assert mlp.linear_fc1.weight.shape == (config.model.ffn_hidden_size, config.model.hidden_size)
    torch.testing.assert_close(mlp(x)[0], expected)


def test_names_of_kinds() -> None:
    """A configuration names what is registered and nothing else; the width without a gate is 4 · hidden_size."""
    shape: dict[str, Any] = {**SMALL["model"], "ffn_hidden_size": None}
    assert ModelConfig.model_validate({**shape, "activation": "relu2"}).ffn_hidden_size == 256
    with pytest.raises(ValueError, match="'swiglu', 'gelu' or 'relu2'"):
        ModelConfig.model_validate({**shape, "activation": "tests.arch:MODULE"})


def test_a_kind_that_no_exported_model_can_compute_is_refused() -> None:
    extensions.register("ffn", "private", FFNKind(RELU2.module, gated=False, hidden_act=None, saved=2))
    try:
        model = ModelConfig.model_validate({**SMALL["model"], "activation": "private"})
        with pytest.raises(CheckpointError, match=r"model\.activation private"):
            plain_architecture(model, LoopPlan.empty(4))
    finally:
        extensions.unregister("ffn", "private")
