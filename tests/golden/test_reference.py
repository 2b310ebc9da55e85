"""The independent reference against the golden trajectory, and against Hugging Face where that is silent."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import reference_sgt
from tests.helpers.trajectories import BASE, GOLDEN, VARIANTS, init_weights, random_tokens, read_trajectory

TOLERANCE = {"loss": 3e-5, "grad_norm": 1e-4, "ema_entropy": 3e-5, "head_decay": 1e-5, "probe_logits": 1e-3}


@cache
def golden_and_reference() -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    golden, meta = read_trajectory(GOLDEN)
    init = {key.removeprefix("init/"): w for key, w in golden.items() if key.startswith("init/")}
    return golden, meta, reference_sgt.run_trajectory(init, golden["tokens"], meta, golden["probe_tokens"])


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max())


def test_events_are_exact() -> None:
    _, meta, result = golden_and_reference()
    assert result["events"] == meta["events"]


@pytest.mark.parametrize("key", TOLERANCE)
def test_recorded_values(key: str) -> None:
    golden, _, result = golden_and_reference()
    assert result[key].dtype == golden[key].dtype
    measured = difference(result[key], golden[key])
    assert measured <= TOLERANCE[key], f"{key}: differs by {measured:.2e}, allowed {TOLERANCE[key]:.0e}"


def test_loop_depth_is_exact() -> None:
    golden, _, result = golden_and_reference()
    assert torch.equal(result["loop_depth"], golden["loop_depth"])


def test_final_weights() -> None:
    golden, _, result = golden_and_reference()
    names = [key for key in golden if key.startswith("final/")]
    assert names == [key for key in sorted(result) if key.startswith("final/")]
    measured = {name: difference(result[name], golden[name]) for name in names}
    worst = max(measured, key=lambda name: measured[name])
    assert measured[worst] <= 5e-4, f"{worst} differs by {measured[worst]:.2e}, allowed 5e-4"


def test_keys_are_those_of_the_golden_file() -> None:
    golden, _, result = golden_and_reference()
    inputs = {"tokens", "probe_tokens"} | {key for key in golden if key.startswith("init/")}
    assert set(result) - {"events"} == set(golden) - inputs


def test_reference_stands_alone() -> None:
    source = Path(reference_sgt.__file__).read_text()
    assert len(source.splitlines()) <= 405
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported == {"collections", "hashlib", "math", "typing", "torch"}


def plain_forward(weights: dict[str, Tensor], tokens: Tensor, model: dict[str, Any], **blocks: Any) -> Tensor:
    layers = model["num_layers"]
    gates = torch.ones(layers, model["num_attention_heads"])
    return reference_sgt.forward(weights, tokens, model, [0] * layers, gates, blocks.get("blocks", {}))[0]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {"num_query_groups": 2}),
        ("Llama", {"num_query_groups": 1, "untie_embeddings_and_output_weights": False}),
        ("Qwen3", {"num_query_groups": 2, "qk_layernorm": True, "kv_channels": 16}),
        ("Olmo2", VARIANTS["olmo2"]["model"]),
    ],
)
def test_variants_of_the_decoder_against_hugging_face(architecture: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model = {**BASE["model"], **changes}
    weights = init_weights(model, seed=5)
    untied = model.get("untie_embeddings_and_output_weights", True)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_hidden_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model["num_query_groups"],
        head_dim=model.get("kv_channels", model["hidden_size"] // model["num_attention_heads"]),
        rms_norm_eps=model["norm_eps"],
        max_position_embeddings=model["seq_length"],
        rope_theta=float(model["rope_theta"]),
        tie_word_embeddings=not untied,
        attn_implementation="eager",
    )
    other = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and missing == ([] if untied else ["lm_head.weight"])
    tokens = random_tokens((3, model["seq_length"]), model["vocab_size"], seed=6).long()
    with torch.no_grad():
        measured = difference(plain_forward(weights, tokens, model), other(tokens).logits)
    assert measured < 1e-5, f"logits differ by {measured:.2e}"


def looped_layer(loops: int, gates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Output and input of one layer, its weights, and the entropies [pass, H]."""
    weights = init_weights({**BASE["model"], "num_layers": 1}, seed=9)
    prefix = "model.layers.0."
    w = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
    x = torch.randn(2, 8, BASE["model"]["hidden_size"], generator=torch.Generator().manual_seed(1))
    out, entropies = reference_sgt.layer(w, x, loops, gates, BASE["model"])
    return out, x, w, torch.stack(entropies)


def test_gates_at_zero_leave_the_ordinary_layer() -> None:
    assert torch.equal(looped_layer(2, torch.zeros(4))[0], looped_layer(0, torch.ones(4))[0])
    assert not torch.allclose(looped_layer(1, torch.ones(4))[0], looped_layer(0, torch.ones(4))[0])


def test_a_looped_pass_is_the_sum_of_its_gated_heads() -> None:
    gates = torch.tensor([1.0, 0.3, 0.0, 1.0])
    out, x, w, _ = looped_layer(1, gates)
    model, eps = BASE["model"], BASE["model"]["norm_eps"]
    for scale in (None, gates):
        normed = reference_sgt.rms_norm(x, w["input_layernorm.weight"], eps)
        if scale is None:
            x = x + reference_sgt.attention(w, normed, None, model)[0]
        else:
            single = torch.eye(4)
            x = x + sum(scale[h] * reference_sgt.attention(w, normed, single[h], model)[0] for h in range(4))
    without_attention = {**w, "self_attn.o_proj.weight": torch.zeros_like(w["self_attn.o_proj.weight"])}
    expected = reference_sgt.layer(without_attention, x, 0, gates, model)[0]
    assert difference(out, expected) < 1e-6


def test_entropy_is_one_for_even_attention_and_zero_for_one_position() -> None:
    _, x, w, entropies = looped_layer(2, torch.ones(4))
    assert entropies.shape == (3, 4)
    assert entropies.min() > 0.0 and entropies.max() < 1.0
    even = {**w, "self_attn.q_proj.weight": torch.zeros_like(w["self_attn.q_proj.weight"])}
    assert reference_sgt.attention(even, x, None, BASE["model"])[1].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    sharp = {**w, "self_attn.q_proj.weight": 1e4 * w["self_attn.q_proj.weight"]}
    assert reference_sgt.attention(sharp, x, None, BASE["model"])[1].tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_block_loop_equals_a_deeper_model_with_shared_layers() -> None:
    model = {**BASE["model"], "num_layers": 3}
    weights = init_weights(model, seed=2)
    deeper = {name: w for name, w in weights.items() if ".layers." not in name}
    for n, source in enumerate([0, 1, 1, 1, 2]):
        prefix = f"model.layers.{source}."
        layer = {name: w for name, w in weights.items() if name.startswith(prefix)}
        deeper |= {name.replace(prefix, f"model.layers.{n}."): w for name, w in layer.items()}
    tokens = random_tokens((2, model["seq_length"]), model["vocab_size"], seed=3).long()
    looped = plain_forward(weights, tokens, model, blocks={1: 2})
    assert torch.equal(looped, plain_forward(deeper, tokens, {**model, "num_layers": 5}))
    assert not torch.allclose(looped, plain_forward(weights, tokens, model))
