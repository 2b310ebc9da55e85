"""Parameters by part equal those of the built model, for every example configuration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.arch.weights import weights
from megatron_sgt.config import load_config
from megatron_sgt.planning.parameters import parameter_count, parameters_by_part
from tests.helpers.meta import meta_model
from tests.helpers.single import single_model, small_config
from tests.helpers.variants import MODEL_VARIANTS

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
PARTS = {
    "word_embeddings": "embedding",
    "output_layer": "output",
    "layernorm": "norms",
    "self_attention": "attention",
    "mlp": "mlp",
}
"""What a parameter's name holds -> its part; the first that fits."""


def by_part(model: Any) -> Counter[str]:
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counted[next(part for word, part in PARTS.items() if word in name)] += parameter.numel()
    return counted


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_as_many_as_are_built(path: Path) -> None:
    one_stage = [f"parallel.{name}pipeline_model_parallel_size=1" for name in ("", "virtual_")]
    config = load_config(path, ["model.vocab_size=32000", *one_stage])
    counted = by_part(meta_model(config))
    assert parameters_by_part(config.model) == counted
    assert parameter_count(config.model) == sum(counted.values())


@pytest.mark.parametrize("variant", [*MODEL_VARIANTS, "gelu"])
def test_every_variant(variant: str) -> None:
    gelu = {"activation": "gelu", "normalization": "LayerNorm", "add_bias_linear": True}
    config = small_config(model=MODEL_VARIANTS.get(variant, gelu))
    assert parameters_by_part(config.model) == by_part(single_model(config))


def test_a_rank_holds_its_share_of_what_is_shared() -> None:
    model = small_config(model={"add_bias_linear": True, "qk_layernorm": True}).model
    shared = sum(w.elements for w in weights(model) if w.split != "replicated")
    assert parameter_count(model, 4) == parameter_count(model) - shared + shared // 4
