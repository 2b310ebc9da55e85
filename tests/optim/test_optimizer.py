"""Which AdamW is built where; GPUs and Apex are pretended. And a registered optimizer."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_sgt import extensions
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.optim.optimizer import OPTIMIZERS, build_optimizer
from tests.helpers.choices import built_in

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = OptimConfig(lr=3e-3, adam_beta1=0.8, adam_beta2=0.99, adam_eps=1e-6, weight_decay=0.2)
OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6}

NVIDIA = {
    "__init__.py": "",
    "optimizers/__init__.py": (
        "class FusedAdam:\n    def __init__(self, groups, **options):\n"
        "        self.groups, self.options = groups, options\n"
    ),
}
# The package of that name on PyPI: a web toolkit, which fails to import besides.
UNRELATED = {"__init__.py": "from pyramid_that_is_not_there import session\n"}
UNRELATED_THAT_IMPORTS = {"__init__.py": "", "models.py": ""}


def parameters() -> list[dict[str, Any]]:
    return [
        {"params": [torch.nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.2},
        {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0},
    ]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages in front of all others, where no apex was imported yet."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)

    forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def torch_adamw(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that torch's AdamW was called with (where it is asked for a GPU)."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: calls.append(options))
    return calls


def install(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (site / "apex" / name).parent.mkdir(parents=True, exist_ok=True)
        (site / "apex" / name).write_text(text)


def test_cpu() -> None:
    groups = parameters()
    optimizer = build_optimizer(groups, CONFIG, CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert {name: group[name] for name in OPTIONS} == OPTIONS


def test_one_step_by_hand() -> None:
    """First step of AdamW: w (1 - lr wd) - lr g / (|g| + eps), the bias corrections cancelling."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.2}], CONFIG, CPU)
    weight.grad = torch.tensor([0.5])
    optimizer.step()
    wanted = 2.0 * (1 - 3e-3 * 0.2) - 3e-3 * 0.5 / (0.5 + 1e-6)
    assert weight.item() == pytest.approx(wanted, abs=1e-7)


def test_gpu_with_apex(site: Path, torch_adamw: list[dict[str, Any]]) -> None:
    install(site, NVIDIA)
    groups = parameters()
    optimizer: Any = build_optimizer(groups, CONFIG, GPU)
    assert type(optimizer).__name__ == "FusedAdam" and type(optimizer).__module__ == "apex.optimizers"
    assert optimizer.groups is groups
    assert optimizer.options == {**OPTIONS, "adam_w_mode": True}
    assert torch_adamw == []


@pytest.mark.parametrize("apex", [{}, UNRELATED, UNRELATED_THAT_IMPORTS], ids=["none", "broken", "unrelated"])
def test_gpu_without_nvidias_apex(apex: dict[str, str], site: Path, torch_adamw: list[dict[str, Any]]) -> None:
    install(site, apex)
    build_optimizer(parameters(), CONFIG, GPU)
    assert torch_adamw == [{**OPTIONS, "fused": True}]


def test_offload_ignores_apex(site: Path, torch_adamw: list[dict[str, Any]]) -> None:
    """Its kernels cannot update where the state then is."""
    install(site, NVIDIA)
    build_optimizer(parameters(), CONFIG, GPU, offloaded=True)
    assert torch_adamw == [{**OPTIONS, "fused": True}]


def test_cpu_ignores_apex(site: Path) -> None:
    install(site, NVIDIA)
    assert type(build_optimizer(parameters(), CONFIG, CPU)) is torch.optim.AdamW


def test_a_registered_optimizer_is_built_by_its_name() -> None:
    def momentum(groups: Any, config: OptimConfig, device: torch.device, offloaded: bool) -> Any:
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.adam_beta1)

    with pytest.raises(ValidationError, match="'adamw'"):
        OptimConfig(lr=3e-3, optimizer="momentum")
    extensions.register("optimizers", "momentum", momentum)
    try:
        config = OptimConfig(lr=3e-3, adam_beta1=0.8, optimizer="momentum")
        optimizer = build_optimizer(parameters(), config, CPU)
    finally:
        extensions.unregister("optimizers", "momentum")
    assert type(optimizer) is torch.optim.SGD
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (3e-3, 0.8, 0.2),
        (3e-3, 0.8, 0.0),
    ]


def test_the_table_has_what_the_configuration_knows() -> None:
    assert built_in(OptimConfig, "optimizer") == tuple(OPTIMIZERS)
