"""Tools that watch or replace the projections of exported models: quantisation, adapters, pruning, statistics.

Without loops each gives what it gives on Llama. With loops the reference is Llama with a layer for every attention
pass, which calls the very modules that the tool has left.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.helpers.hf_models import as_llama, gap, hf_model, random_ids, reference_logits, unrolled_llama
from tests.helpers.serving import for_serving

# Where a value lies between two of its steps, dynamic quantisation turns the last bit of a sum into a step.
STEPS = {"dynamic_int8": 0.05}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LOOPS: dict[str, dict[str, Any]] = {
    "depths": {"3": {"heads": [0, 3], "depth": 3}, "1": {"heads": [0, 1, 2], "depth": 1}},
    "window_and_block": {"2": {"heads": [1], "depth": 2, "other_gate": 0.35}, "0": {"block_loops": 1}},
}


FORMS: dict[str, Callable[[Any], Any]] = {"standard": lambda model: model, "serving": for_serving}


def looping(loops: str = "depths", form: str = "standard") -> Any:
    return FORMS[form](hf_model("never_grown", num_key_value_heads=2, sgt_loops=LOOPS[loops]))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Up to single precision, for logits of any size."""
    return gap(found, expected) < tolerance * max(1.0, float(expected.detach().abs().max()))


def each_projection(model: nn.Module, change: Callable[[nn.Module, str, Any], None]) -> Any:
    """``model`` after ``change(attention, name, linear)`` of the projections of every attention."""
    for attention in [m for m in model.modules() if hasattr(m, "q_proj")]:
        for name in PROJECTIONS:
            change(attention, name, getattr(attention, name))
    return model


def dynamic_int8(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the successor of this module
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class Int8Linear(nn.Module):
    """Weight-only quantisation in the manner of bitsandbytes: another class, whose weight has no plain rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


class Rounded(Tensor):
    """Weight-only quantisation in the manner of torchao: nn.Linear stays, its weight is a tensor of another class."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return F.linear(args[0], (args[1].as_subclass(Tensor) * 16).round() / 16, *args[2:])
        if function is Tensor.__getitem__:
            raise NotImplementedError("this weight has no slices")
        return super().__torch_function__(function, kinds, args, kwargs or {})


class Third(nn.Module):
    """One of the three projections that a fuser has made one."""

    def __init__(self, fused: nn.Linear, part: slice) -> None:
        super().__init__()
        self.fused, self.part = fused, part

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x)[..., self.part]


def fused_qkv(model: nn.Module) -> Any:
    for attention in [m for m in model.modules() if hasattr(m, "q_proj")]:
        linears = [getattr(attention, name) for name in PROJECTIONS[:3]]
        fused = nn.Linear(linears[0].in_features, sum(each.out_features for each in linears), bias=False)
        fused.weight = nn.Parameter(torch.cat([each.weight.detach() for each in linears]))
        start = 0
        for name, linear in zip(PROJECTIONS, linears, strict=False):
            setattr(attention, name, Third(fused, slice(start, start + linear.out_features)))
            start += linear.out_features
    return model


class Halved(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def adapted(config: peft.PeftConfig) -> Callable[[nn.Module], Any]:
    def change(model: nn.Module) -> Any:
        torch.manual_seed(7)
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:  # IA3 and DoRA begin as the model itself
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return wrapped.base_model.model

    return change


def lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=PROJECTIONS, init_lora_weights=False, **options)


OPERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "dynamic_int8": dynamic_int8,
    "replaced_linears": lambda m: each_projection(m, lambda a, n, linear: setattr(a, n, Int8Linear(linear))),
    "weights_of_another_class": lambda m: each_projection(
        m, lambda _, n, linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach().as_subclass(Rounded)))
    ),
    "fused_qkv": fused_qkv,
    "lora": adapted(lora()),
    "dora": adapted(lora(use_dora=True)),
    "ia3": adapted(peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=[])),
    "pruned": lambda m: each_projection(m, lambda _, n, linear: prune.l1_unstructured(linear, "weight", 0.5)),
    "parametrised": lambda m: each_projection(
        m, lambda _, n, linear: parametrize.register_parametrization(linear, "weight", Halved())
    ),
    "steered_by_hooks": lambda m: each_projection(
        m, lambda _, n, linear: linear.register_forward_hook(lambda module, x, out: 1.1 * out)
    ),
    "steered_by_pre_hooks": lambda m: each_projection(
        m, lambda _, n, linear: linear.register_forward_pre_hook(lambda module, x: (0.9 * x[0],))
    ),
    "own_forward": lambda m: each_projection(
        m, lambda _, n, linear: setattr(linear, "forward", lambda x: 1.1 * F.linear(x, linear.weight))
    ),
    "offloaded": lambda m: accelerate.cpu_offload(m, execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_without_loops_a_tool_gives_what_it_gives_on_llama(name: str, form: str) -> None:
    plain, tokens = hf_model("never_grown", num_key_value_heads=2), random_ids(2, 9)
    untouched = plain(tokens).logits
    llama = OPERATIONS[name](as_llama(plain))
    plain = FORMS[form](plain)
    found = OPERATIONS[name](plain)(tokens).logits
    assert close(found, llama(tokens).logits, STEPS.get(name, 1e-5))
    assert name in ("fused_qkv", "offloaded") or gap(found, untouched) > 0.01, "the tool did nothing"


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_with_loops_every_pass_is_the_tools(name: str, loops: str, form: str) -> None:
    model, tokens = OPERATIONS[name](looping(loops, form)), random_ids(2, 9)
    assert close(model(tokens).logits, unrolled_llama(model)(tokens).logits, STEPS.get(name, 1e-5))


def test_the_unrolled_llama_is_the_reference() -> None:
    model, tokens = looping(), random_ids(2, 9)
    assert close(unrolled_llama(model)(tokens).logits, reference_logits(model, tokens))


@pytest.mark.parametrize("form", FORMS)
def test_merged_adapters_are_the_model_that_they_were(form: str) -> None:
    tokens = random_ids(2, 9)
    wrapped = peft.get_peft_model(looping(form=form), lora())
    unmerged = wrapped(tokens).logits
    merged = wrapped.merge_and_unload()
    assert close(merged(tokens).logits, unmerged) and close(unrolled_llama(merged)(tokens).logits, unmerged)


def test_gradients_of_adapters_come_from_every_pass() -> None:
    tokens = random_ids(2, 9)
    model = OPERATIONS["lora"](looping()).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(adapters) == 2 * 4 * 4
    found, expected = (
        torch.autograd.grad(m(tokens, labels=tokens).loss, adapters) for m in (model, unrolled_llama(model))
    )
    assert all(gap(*pair) < 1e-5 for pair in zip(found, expected, strict=True))


def second_moments(model: nn.Module, names: dict[nn.Module, str], tokens: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Calls of every projection, and the sum of xᵀx over its inputs: what GPTQ, AWQ and Wanda choose by."""
    calls: dict[str, int] = defaultdict(int)
    moments: dict[str, Tensor] = {}

    def note(module: nn.Module, x: tuple[Tensor, ...], _: Tensor) -> None:
        rows = x[0].detach().flatten(0, -2)
        calls[names[module]] += 1
        moments[names[module]] = moments.get(names[module], torch.zeros(())) + rows.T @ rows

    handles = [module.register_forward_hook(note) for module in names]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return {name: (calls[name], moments[name]) for name in calls}


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("form", FORMS)
def test_statistics_count_every_pass(loops: str, form: str) -> None:
    """A loop's output projection is seen with zeros in the place of the heads that do not loop."""
    model, tokens = looping(loops, form), random_ids(2, 9)
    names = {m: n for n, m in model.model.named_modules() if n.endswith("_proj")}
    found = second_moments(model, names, tokens)
    expected = second_moments(unrolled_llama(model), names, tokens)
    assert found.keys() == expected.keys() and len(found) == 4 * 7
    for name, (calls, moments) in found.items():
        assert calls == expected[name][0] and gap(moments, expected[name][1]) < 1e-3, name
    busiest = found["layers.3.self_attn.o_proj" if loops == "depths" else "layers.2.self_attn.o_proj"][0]
    assert busiest == (4 if loops == "depths" else 3)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["of_the_module", "of_all_modules"])
def test_hooks_of_every_kind_see_loops(kind: str, everywhere: bool) -> None:
    model, tokens, seen = looping(), random_ids(1, 5), 0
    projection = model.model.layers[3].self_attn.v_proj

    def note(module: nn.Module, *_: Any) -> None:
        nonlocal seen
        seen += module is projection

    if everywhere:
        handle = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(note)
    else:
        handle = getattr(projection, f"register_{kind}_hook")(note)
    try:
        model(tokens, labels=tokens).loss.backward()
    finally:
        handle.remove()
    assert seen == 4


def test_layers_can_be_run_one_by_one_as_llamas() -> None:
    """As quantisers do: they catch what the first layer is given, and hand each layer's output to the next.

    In the form for serving a layer is handed the passes that are its own: such tools take the standard form.
    """
    model, tokens = looping(), random_ids(2, 9)
    model.set_attn_implementation("eager")
    caught: list[Any] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: caught.append((args, kwargs)), with_kwargs=True
    )
    expected = model(tokens, use_cache=False).logits
    handle.remove()
    (args, kwargs), *rest = caught
    assert len(args) == 1 and not rest
    x = args[0]
    for layer in model.model.layers:
        x = layer(x, **kwargs)
        assert isinstance(x, Tensor)
    assert torch.equal(model.lm_head(model.model.norm(x)), expected)
    assert {"attention_mask", "position_embeddings", "position_ids", "past_key_values"} <= set(kwargs)
