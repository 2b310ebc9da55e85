"""Exported models through torch.export and torch.compile: one graph for every batch and length, right in each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.exhaustive import share_of
from tests.helpers.hf_models import gap, hf_model, random_ids
from tests.helpers.serving import for_serving

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.compile lags behind new Pythons")
KINDS: dict[str, dict[str, Any]] = {
    "depth_2": {"num_key_value_heads": 2, "qk_norm": True, "sgt_loops": {"1": {"heads": [0, 1, 3], "depth": 2}}},
    "window": {"num_key_value_heads": 2, "sgt_loops": {"0": {"heads": [1], "depth": 1, "other_gate": 0.35}}},
    "block_loop_tied_biases": {
        "tie_word_embeddings": True, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
        "sgt_loops": {"1": {"block_loops": 1}},
    },
}  # fmt: skip
EVERY = [(kind, strict, form) for kind in KINDS for strict in (False, True) for form in ("standard", "serving")]
SHARE = [("depth_2", True, "standard"), ("window", False, "serving")]


def small_model(kind: str, form: str = "standard") -> Any:
    model = hf_model("never_grown", num_hidden_layers=2, **KINDS[kind])
    return for_serving(model) if form == "serving" else model


@pytest.fixture(autouse=True)
def without_dynamos_notes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        yield
    torch._dynamo.reset()


def padded(*shape: int) -> dict[str, Any]:
    tokens = random_ids(*shape)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask, "use_cache": False}


@pytest.mark.parametrize(("kind", "strict", "form"), share_of(EVERY, SHARE))
def test_one_graph_serves_every_batch_and_length(kind: str, strict: bool, form: str) -> None:
    model = small_model(kind, form)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    sizes = {0: batch, 1: length}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    program = torch.export.export(model, (), padded(3, 9), dynamic_shapes=shapes, strict=strict)
    for shape in ((3, 9), (5, 17)):
        inputs = padded(*shape)
        found, expected = program.module()(**inputs).logits, model(**inputs).logits
        assert gap(found[:, 3:], expected[:, 3:]) < 1e-5
    widths = {
        node.meta["val"].shape[-1] for node in program.graph.nodes if node.target is torch.ops.aten.linear.default
    }
    assert (kind, form) != ("depth_2", "standard") or 36 in widths, "the graph does not compute the kept heads alone"


def test_a_wrapped_projection_is_exported_as_it_is() -> None:
    """What stands for a tensor while torch traces counts as plain; another class of module does not."""

    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    model, inputs = small_model("depth_2"), padded(2, 9)
    untouched = model(**inputs).logits
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Half
    program = torch.export.export(model, (), inputs, strict=False)
    found = program.module()(**inputs).logits
    assert gap(found[:, 3:], model(**inputs).logits[:, 3:]) < 1e-5 and gap(found, untouched) > 0.1
