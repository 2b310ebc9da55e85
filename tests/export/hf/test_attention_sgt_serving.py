"""Passes as modules: what replaces projections sees each of them; a rank that holds some heads gates the right ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.hf_models import gap
from tests.helpers.ranks import run_on_ranks
from tests.helpers.serving import KINDS, TOKENS, Pair, for_serving, pair_of, standard_model


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


class OfFused(nn.Module):
    """One part of a projection of queries, keys and values together, as vLLM and fused adapters have it."""

    def __init__(self, fused: nn.Linear, first: int, last: int, calls: list[int]) -> None:
        super().__init__()
        self.fused, self.part, self.calls = fused, slice(first, last), calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return self.fused(x)[..., self.part]


@torch.no_grad()
def test_whatever_takes_the_place_of_projections_sees_every_pass(pair: Pair) -> None:
    model, calls = for_serving(pair.standard), []
    for layer in model.model.layers:
        attention = layer.self_attn
        plain = [attention.q_proj, attention.k_proj, attention.v_proj]
        rows = [linear.out_features for linear in plain]
        fused = nn.Linear(plain[0].in_features, sum(rows), bias=plain[0].bias is not None).double()
        fused.weight.copy_(torch.cat([linear.weight for linear in plain]))
        if fused.bias is not None:
            fused.bias.copy_(torch.cat([linear.bias for linear in plain]))
        for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
            setattr(attention, name, OfFused(fused, sum(rows[:n]), sum(rows[: n + 1]), calls))
        attention.o_proj.register_forward_hook(lambda *_: calls.append(1))
    assert gap(model(TOKENS).logits, pair.expected) < 1e-5
    assert len(calls) == 4 * model.config.num_hidden_layers


class TwoRanks(nn.Module):
    """An attention whose heads are on two ranks; their outputs are summed, the output's bias counts once."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.ranks = nn.ModuleList([self._part(attention, rank) for rank in (0, 1)])

    @staticmethod
    def _part(attention: Any, rank: int) -> Any:
        part = type(attention)(attention.config, attention.layer_idx).double()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear, dim = getattr(attention, name), int(name == "o_proj")
            mine = getattr(part, name)
            mine.weight = nn.Parameter(linear.weight.chunk(2, dim)[rank])
            if linear.bias is not None:
                whole = linear.bias * (rank == 0) if dim else linear.bias.chunk(2)[rank]
                mine.bias = nn.Parameter(whole)
        if attention.config.qk_norm:
            part.q_norm, part.k_norm = attention.q_norm, attention.k_norm
        return part

    def forward(self, hidden_states: Tensor, rank: int | None = None, **kwargs: Any) -> Tensor:
        return sum(part(hidden_states, rank=n, **kwargs) for n, part in enumerate(self.ranks))

    def rank(self) -> None:
        return None


@torch.no_grad()
def test_two_tensor_parallel_ranks_are_right(pair: Pair) -> None:
    model = for_serving(pair.standard)
    for layer in model.model.layers:
        layer.self_attn = TwoRanks(layer.self_attn)
    if pair.standard.config.qk_norm_over == "all":
        with pytest.raises(ValueError, match=r"4 of 8 heads are on this rank, .* without tensor parallelism"):
            model(TOKENS, use_cache=False)
        return
    assert gap(model(TOKENS, use_cache=False).logits, pair.expected) < 1e-5


def on_rank(info: RankInfo, folder: Path) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Rows of a query projection on this rank, logits and greedy text under transformers' own tensor parallelism."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto", tp_plan="auto").eval()
    with torch.no_grad():
        rows = model.model.layers[0].self_attn.q_proj.weight.to_local().shape
        return tuple(rows), model(TOKENS).logits, model.generate(TOKENS, do_sample=False, max_new_tokens=4)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="it is another tensor parallelism there")
@torch.no_grad()
def test_transformers_own_tensor_parallelism_is_right(tmp_path: Path) -> None:
    model = for_serving(standard_model("block_and_heads_in_a_window"))
    auto = {"AutoConfig": type(model.config), "AutoModelForCausalLM": type(model)}
    try:
        for name, kind in auto.items():
            kind.register_for_auto_class(name)
        model.save_pretrained(tmp_path)
    finally:
        for kind in auto.values():
            kind._auto_class = None
    text = model.generate(TOKENS, do_sample=False, max_new_tokens=4)
    for rows, logits, greedy in run_on_ranks(2, on_rank, tmp_path, backend="gloo"):
        assert rows == (32, 64), "half of the heads"
        assert gap(logits, model(TOKENS).logits) < 1e-9 and torch.equal(greedy, text)


@torch.no_grad()
def test_heads_of_an_unknown_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = for_serving(standard_model("two_of_eight_heads"))
    loop = model.model.passes[2]
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 1, 3, 8)
    loop.num_key_value_groups = 4
    with pytest.raises(ValueError, match="4 of 8 heads are on this rank, and the runtime does not say which"):
        loop(query, key, key, None, None)
    assert loop(query, key, key, None, 1).shape == (1, 3, 32)
    said = SimpleNamespace(get_tensor_model_parallel_rank=lambda: 1)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", said)
    assert for_serving(standard_model("two_of_eight_heads")).model._rank == 1
