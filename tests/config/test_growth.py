"""The rules inside the growth section."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config import GrowthConfig


def test_defaults_are_the_papers() -> None:
    growth = GrowthConfig()
    assert (growth.first_selection_step, growth.window_size) == (250, 250)
    assert (
        growth.top_k_layers,
        growth.max_selected_layers,
        growth.max_loop_depth,
        growth.num_keep_heads,
    ) == (3, 3, 1, 2)
    assert (growth.decay_type, growth.ema_decay, growth.exclude_layers) == ("linear", 0.5, (0,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"window_size": 0}, "window_size"),
        ({"max_loop_depth": 0}, "max_loop_depth"),
        ({"exclude_layers": (1, 1)}, "exclude_layers: names a layer twice"),
        ({"method": "block_loop", "block_loop_layers": (2, 2)}, "block_loop_layers: names a layer twice"),
        ({"method": "block_loop"}, "block_loop_layers: is empty with method 'block_loop'"),
        ({"block_loop_layers": (1,)}, "has no effect with method 'sgt'"),
        ({"method": "dense"}, "'sgt', 'vanilla' or 'block_loop'"),
    ],
)
def test_rules(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GrowthConfig(**given)


def test_no_layer_need_be_excluded_and_no_past_need_count() -> None:
    growth = GrowthConfig(exclude_layers=(), ema_decay=0)
    assert (growth.exclude_layers, growth.ema_decay) == ((), 0)
