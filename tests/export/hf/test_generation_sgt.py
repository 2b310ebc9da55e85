"""What generation refuses before a thread of its own would fail, and what it leaves to transformers."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from megatron_sgt.export.hf.modeling_sgt_serving import SGTServingForCausalLM
from tests.helpers.serving import pair_of, standard_model


@pytest.mark.parametrize("kind", ["two_of_eight_heads", "block_loop"])
def test_the_standard_form_refuses_continuous_batching_at_once(kind: str) -> None:
    model = pair_of(kind).standard
    for begin in (lambda: model.generate_batch(inputs=[[3, 4, 5]]), model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"^continuous batching would mix up .* --for serving"):
            begin()
    assert not SGTForCausalLM.is_backend_compatible() and SGTServingForCausalLM.is_backend_compatible()


@pytest.mark.parametrize("form", ["standard", "serving"])
def test_without_loops_or_for_serving_it_is_transformers_own(form: str) -> None:
    model: Any = standard_model("block_loop", sgt_loops={}) if form == "standard" else pair_of("block_loop").serving
    assert type(model.init_continuous_batching()).__name__ == "ContinuousBatchingManager"
