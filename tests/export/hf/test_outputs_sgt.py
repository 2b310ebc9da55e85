"""Which outputs a caller wants of exported models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sgt.export.hf.outputs_sgt import chosen_states, wants_dict
from tests.helpers.hf_models import hf_config


@pytest.mark.parametrize(("wanted", "kept"), [(True, {0, 1, 2, 3}), (2, {2}), ([0, -1], {0, 3}), ([7, -9, 1], {1})])
def test_chosen_states_keep_their_places(wanted: Any, kept: set[int]) -> None:
    states = [torch.full((1,), float(n)) for n in range(4)]
    found = chosen_states(states, wanted)
    assert [None if state is None else int(state) for state in found] == [n if n in kept else None for n in range(4)]


def test_the_configuration_speaks_where_the_caller_is_silent() -> None:
    config = hf_config()
    assert wants_dict(None, config) and wants_dict(True, config) and not wants_dict(False, config)
    assert not wants_dict(None, hf_config(return_dict=False))
