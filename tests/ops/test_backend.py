"""Which backend runs where, and the reason that is given when it cannot."""

from dataclasses import replace

import pytest
import torch

from megatron_sgt.ops import backend
from megatron_sgt.ops.backend import BackendError, LoopShape, choose_attention, choose_backend

GPU = LoopShape(torch.device("cuda"), torch.bfloat16, 128)


@pytest.fixture(autouse=True)
def a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is there, and a Hopper GPU, whatever this machine has."""
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_gpu_takes_triton() -> None:
    assert choose_backend("auto", GPU) == ("triton", "loop kernels: triton")
    assert choose_backend("triton", GPU)[0] == "triton"
    assert choose_backend("torch", GPU)[0] == "torch"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "the device is cpu"),
        ({"norm": "LayerNorm"}, "the norm is LayerNorm"),
        ({"norm_position": "output"}, "model.norm_position is output; only norms of inputs"),
        ({"norms_all_heads": True}, "model.qk_layernorm_over is all"),
        ({"head_size": 96}, "the head size is 96; kernels exist for 16, 32, 64, 128"),
        ({"attention_dropout": 0.1}, "the model has dropout"),
        ({"hidden_dropout": 0.1}, "the model has dropout"),
        ({"dtype": torch.float64}, "the type is torch.float64"),
    ],
)
def test_auto_gives_way_and_a_forced_backend_raises(change: dict[str, object], reason: str) -> None:
    shape = replace(GPU, **change)  # type: ignore[arg-type]
    chosen, line = choose_backend("auto", shape)
    assert chosen == "torch" and reason in line
    with pytest.raises(BackendError, match=f"train.loop_backend is triton, but {reason}"):
        choose_backend("triton", shape)


def test_without_triton_and_on_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "older than compute capability 8.0" in choose_backend("auto", GPU)[1]
    monkeypatch.setattr(backend, "triton_installed", lambda: False)
    with pytest.raises(BackendError, match=r"pip install megatron-sgt\[gpu\]"):
        choose_backend("triton", GPU)


def test_the_interpreter_is_taken_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shape = replace(GPU, device=torch.device("cpu"), dtype=torch.float32)
    assert choose_backend("auto", shape)[0] == "torch"
    assert choose_backend("triton", shape)[0] == "triton"
    with pytest.raises(BackendError, match="interpreter has no bf16"):
        choose_backend("triton", replace(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("pairs", "tokens", "size", "arch", "kind"),
    [
        (2, 4096, 128, 90, "custom"),
        (4, 4096, 64, 80, "custom"),
        (5, 4096, 128, 90, "library"),
        (2, 32768, 128, 90, "library"),
        (2, 4096, 32, 90, "library"),
        (2, 4096, 128, 100, "custom"),
        (2, 4096, 128, 75, "library"),
    ],
)
def test_the_table_of_the_attention(pairs: int, tokens: int, size: int, arch: int, kind: str) -> None:
    assert choose_attention(pairs, tokens, size, arch) == kind
    assert choose_attention(pairs, tokens, size, arch, "custom") == "custom"
    assert choose_attention(pairs, tokens, size, arch, "library") == "library"
