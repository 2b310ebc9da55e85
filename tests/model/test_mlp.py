"""What a vanilla step does not copy on a CPU, where nothing is compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sgt.model.layer import SGTLayer
from megatron_sgt.model.mlp import SwiGLU
from tests.helpers.single import random_batch, single_model, small_config


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(plain: bool, **sections: dict[str, Any]) -> Counter[str]:
    config = small_config(**sections)
    model = single_model(config, plain).train()
    model(**random_batch(config))  # makes the angles of all steps
    with Operations() as counted:
        model(**random_batch(config)).backward()
    return counted.count


def test_halves_are_not_copied_together() -> None:
    """What is left is the gradient of the fused projection, of queries, keys and values: one per layer."""
    assert operations(plain=False)["cat"] == 4
    assert operations(plain=True)["cat"] > 4 * 4, "Megatron-Core's own activation and rotary positions"


def test_the_slot_is_used_where_nothing_is_compiled() -> None:
    layers = [m for m in single_model(small_config()).modules() if isinstance(m, SGTLayer)]
    assert [type(layer.mlp.activation_func) for layer in layers] == [SwiGLU] * 4
    gelu = single_model(small_config(model={"activation": "gelu"}))
    assert not any(isinstance(m, SwiGLU) for m in gelu.modules())
