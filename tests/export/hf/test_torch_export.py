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

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.compile lags behind new Pythons")
KINDS = ["grouped_qk_norm_depth_3", "multi_query_tied_biases_depth_2", "window", "block_loop"]
EVERY = [(variant, strict) for variant in KINDS for strict in (False, True)]
SHARE = [("grouped_qk_norm_depth_3", True), ("window", False)]


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


@pytest.mark.parametrize(("variant", "strict"), share_of(EVERY, SHARE))
def test_one_graph_serves_every_batch_and_length(variant: str, strict: bool) -> None:
    model = hf_model(variant)
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
    kept = {"grouped_qk_norm_depth_3": 36}.get(variant)
    assert kept is None or kept in widths, "the graph computes the kept heads alone"


def test_a_wrapped_projection_is_exported_as_it_is() -> None:
    """What stands for a tensor while torch traces counts as plain; another class of module does not."""

    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    model, inputs = hf_model("grouped_qk_norm_depth_3"), padded(2, 9)
    untouched = model(**inputs).logits
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Half
    program = torch.export.export(model, (), inputs, strict=False)
    found = program.module()(**inputs).logits
    assert gap(found[:, 3:], model(**inputs).logits[:, 3:]) < 1e-5 and gap(found, untouched) > 0.1
