"""Documents of a sequence do not see each other, in any way of attending: as if each were run alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.engine.build import start_processes
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import gpt, head_loop
from megatron_sgt.model.apply_plan import apply_plan, begin_step, mark_micro_batch
from megatron_sgt.model.documents import DocumentRules, document_mask
from megatron_sgt.model.gpt import LanguageModel, build_model
from tests.helpers.documents import (
    LENGTH,
    VOCABULARY,
    Place,
    document_keys,
    observed_batch,
    random_sequences,
)
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference_sgt import Documents, forward
from tests.helpers.single import single_groups, single_model, small_config
from tests.helpers.variants import hf_of, make_weights_uneven, reference_settings

CPU = torch.device("cpu")
BOTH = {"reset_attention_mask": True, "reset_position_ids": True}
PARTS = ((10, 12, 10), (4, 22), (2, 12))
"""Documents of three sequences, padded at the end: some reach over the shares of two ranks, one ends in the first."""

PLANS: dict[str, LoopPlan] = {
    "no loop": LoopPlan.empty(4),
    "window": LoopPlan(4, ((1, LayerPlan(1, (0, 3), 0.5)), (3, LayerPlan(2, (1, 2), 0.25)))),
    "kept heads": LoopPlan(4, ((1, LayerPlan(1, (0, 3))), (3, LayerPlan(2, (1, 2))))),
    "kept on one rank": LoopPlan(4, ((2, LayerPlan(2, (0, 1))),)),
    "blocks": LoopPlan(4, ((2, LayerPlan(block_loops=1)),)),
}
MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped, q/k norm": {"num_query_groups": 2, "qk_layernorm": True},
    "olmo2": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 2},
}


@dataclass(frozen=True)
class Case:
    """One way through the model. ``loops``: "owner", "balanced", or "fused" (balanced where ranks share heads)."""

    tensor: int
    sequence_parallel: bool = False
    loops: str = "owner"
    recompute: str = "none"
    plan: str = "kept heads"
    model: str = "multi-head"
    double: bool = True


def every_case() -> Iterator[Case]:
    ways = [(1, False, "owner"), (1, False, "fused")]
    ways += [(2, split, loops) for split in (False, True) for loops in ("owner", "balanced")] + [(2, True, "fused")]
    for (tensor, split, loops), recompute, plan, model, double in itertools.product(
        ways, ("none", "selective", "full"), PLANS, MODELS, (True, False)
    ):
        if model == "olmo2" and loops != "owner":
            continue  # refused, or not fused
        if loops == "fused" and double:
            continue  # gains of the definitions are fp32
        yield Case(tensor, split, loops, recompute, plan, model, double)


OBSERVED: tuple[Place, ...] = ((0, 10, 22), (1, 4, 26))
"""(sequence, begin, end) of the documents whose loss is taken."""
LAST: tuple[Place, ...] = ((0, 22, 32), (1, 4, 26), (2, 2, 14))


def packed(others: int) -> dict[str, Tensor]:
    """The micro-batch; the contents of the documents that are not observed come from the seed ``others``."""
    return observed_batch(PARTS, OBSERVED, others)


def alone(batch: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
    """One document of ``batch`` as a sequence of its own."""
    row, begin, end = place
    length = end - begin
    cut = {name: batch[name][row : row + 1, begin:end] for name in ("tokens", "labels", "loss_mask")}
    positions, starts = torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int32)
    return {**cut, "position_ids": positions, "document_starts": starts, "num_tokens": torch.tensor([length]).int()}


class Ways:
    """The model of a case, and what it makes of micro-batches."""

    def __init__(self, info: RankInfo, case: Case) -> None:
        self.config = small_config(
            model={**MODELS[case.model], "vocab_size": VOCABULARY, "seq_length": LENGTH},
            data=BOTH,
            parallel={
                "tensor_model_parallel_size": case.tensor,
                "sequence_parallel": case.sequence_parallel,
                "loop_method": "owner" if case.loops == "owner" or case.tensor == 1 else "balanced",
            },
            train={"recompute_granularity": case.recompute},
            growth={"entropy_min_document_tokens": 4},
        )
        if case.loops == "fused":  # where it runs: a rank of its own, which this test started
            gpt.loop_backend = lambda *_: ("triton", "")  # type: ignore[assignment]
            head_loop.choose_attention = lambda *_: "custom"  # type: ignore[assignment]
        else:
            gpt.loop_backend = _LOOP_BACKEND
            head_loop.choose_attention = _CHOOSE_ATTENTION
        self.groups = start_processes(self.config, info)
        self.model: LanguageModel = build_model(self.config, self.groups, "fp32", 3).train()
        make_weights_uneven(self.model)
        if case.double:
            self.model.double()
        apply_plan(self.model, PLANS[case.plan])

    def run(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Cross-entropies [B, S], gradients of their sum where the mask is 1, entropies."""
        model = self.model
        model.zero_grad()
        model.meter.enabled = True
        begin_step(model)
        mark_micro_batch(model, last=True)
        inputs = model.inputs(batch, CPU)
        losses = model.gpt(inputs["tokens"], inputs["position_ids"], inputs["documents"], labels=inputs["labels"])
        (losses * inputs["loss_mask"].to(losses.dtype)).sum().backward()
        model.meter.end_micro_batch(weight=inputs["documents"].counted)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return losses.detach(), gradients, model.meter.reduce(self.groups)


_LOOP_BACKEND, _CHOOSE_ATTENTION = gpt.loop_backend, head_loop.choose_attention


def largest(gaps: Iterable[Tensor]) -> float:
    return max(float(gap.abs().max()) for gap in gaps)


def measure(info: RankInfo, case: Case) -> dict[str, float]:
    """What moves with the other documents' contents, and what differs from the documents alone."""
    ways = Ways(info, case)
    batch = packed(1)
    losses, gradients, _ = ways.run(batch)
    others_losses, others_gradients, _ = ways.run(packed(2))
    own = [ways.run(alone(batch, place)) for place in OBSERVED]
    summed = {name: sum(one[1][name] for one in own) for name in gradients}
    entropies = ways.run(packed(3))[2]
    last = [ways.run(alone(packed(3), place))[2] for place in LAST]
    size = largest(gradients.values())
    return {
        "moved": largest(
            [losses[row, begin:end] - others_losses[row, begin:end] for row, begin, end in OBSERVED]
            + [gradients[name] - others_gradients[name] for name in gradients]
        ),
        "losses": largest(
            losses[row, begin:end] - one[0][0] for (row, begin, end), one in zip(OBSERVED, own, strict=True)
        ),
        "gradients": largest(gradients[name] - summed[name] for name in gradients) / size,
        "entropies": float(abs(entropies - sum(last) / len(last)).max()),
        "measured": float(entropies.max()),
    }


def on_ranks(info: RankInfo, cases: list[Case]) -> dict[Case, dict[str, float]]:
    return {case: measure(info, case) for case in cases}


SHARE = [
    Case(1, plan="window"),
    Case(1, recompute="selective", model="grouped, q/k norm"),
    Case(1, plan="blocks", recompute="full", model="olmo2"),
    Case(1, loops="fused", recompute="full", double=False),
    Case(1, plan="no loop", double=False),
    Case(2, sequence_parallel=True, loops="balanced", plan="kept on one rank"),
    Case(2, loops="balanced", recompute="full", model="grouped, q/k norm"),
    Case(2, sequence_parallel=True, plan="window", recompute="selective"),
    Case(2, sequence_parallel=True, model="olmo2", plan="kept on one rank"),
    Case(2, sequence_parallel=True, loops="fused", double=False),
    Case(2, sequence_parallel=True, loops="balanced", double=False),
]


def groups_of(cases: list[Case], size: int) -> dict[str, list[Case]]:
    """Cases by name of a group that one start of ranks runs."""
    found: dict[str, list[Case]] = {}
    for tensor in (1, 2):
        chosen = [case for case in cases if case.tensor == tensor]
        for number in range(0, len(chosen), size):
            found[f"{tensor} ranks, from {number}"] = chosen[number : number + size]
    return found


SHORT, ALL = groups_of(SHARE, 100), groups_of(list(every_case()), 60)


@pytest.mark.parametrize("name", share_of([*SHORT, *(f"all: {name}" for name in ALL)], SHORT))
def test_documents_are_as_if_alone(name: str) -> None:
    cases = SHORT[name] if name in SHORT else ALL[name.removeprefix("all: ")]
    for rank, found in enumerate(run_on_ranks(cases[0].tensor, on_ranks, cases, timeout=900)):
        for case, gaps in found.items():
            limit = 1e-12 if case.double else 1e-6
            summed_in_fp32 = not case.double or case.loops == "balanced"  # what owners of kept weights receive
            assert gaps["moved"] == 0.0, (rank, case, gaps)
            assert gaps["losses"] <= limit and gaps["gradients"] <= (1e-6 if summed_in_fp32 else 1e-12), (case, gaps)
            assert gaps["entropies"] <= 2e-6 and gaps["measured"] > 0.1, (rank, case, gaps)


NAMES = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
SETTINGS = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize(("masked", "restarted"), SETTINGS[:-1])
def test_every_setting_does_what_it_says(masked: bool, restarted: bool) -> None:
    """The reference's cross-entropies and entropies, of padded sequences too, and not those of another setting.

    Within documents positions are relative: there a restart changes the noise alone.
    """
    data = {"reset_attention_mask": masked, "reset_position_ids": restarted}
    config = small_config(model={"vocab_size": VOCABULARY}, data=data, growth={"entropy_min_document_tokens": 13})
    model, plan, batch = single_model(config).train(), PLANS["window"], packed(1)
    make_weights_uneven(model)
    apply_plan(model, plan)
    model.meter.enabled = True
    inputs = model.inputs(batch, CPU)
    losses = model.gpt(inputs["tokens"], inputs["position_ids"], inputs["documents"], labels=inputs["labels"])
    model.meter.end_micro_batch(weight=inputs["documents"].counted)
    entropies = model.meter.reduce(single_groups(config))
    weights, gates, starts = hf_of(model, config), torch.tensor(plan.gates(4)).float(), batch["document_starts"]
    for other in SETTINGS:
        told = dict(zip(NAMES, other, strict=False))
        documents = Documents(starts.long(), batch["num_tokens"].long(), told, 13)
        logits, tables = forward(weights, batch["tokens"], reference_settings(config), plan.loops, gates, {}, documents)
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        read = torch.arange(LENGTH) < batch["num_tokens"][:, None]  # what padding would say is nobody's
        same = torch.allclose(losses[read], expected[read], atol=2e-5)
        assert same == (other[0] == masked and (masked or other[1] == restarted)), other
        if same:
            for layer, passes in enumerate(tables):
                found = torch.from_numpy(entropies[layer, : len(passes)]).float()
                assert torch.allclose(found, torch.stack(passes) / int((documents.seen > 0).sum()), atol=2e-6)


def rules(**settings: Any) -> DocumentRules:
    return DocumentRules(**{"told": True, "attention": True, "positions": True, **settings})


def test_what_a_micro_batch_tells() -> None:
    mask = rules(fewest=11).mask_of(document_keys(PARTS), 1, CPU)
    assert mask is not None and mask.attention is mask.positions and mask.attention is not None
    assert mask.attention.lengths == ((10, 12, 10), (4, 22, 6), (2, 12, 18))
    assert (mask.counted, mask.fewest) == (2, 11)  # the last document of the first sequence is too short


def test_whole_sequences_need_no_documents() -> None:
    mask = rules(fewest=LENGTH).mask_of(document_keys([(LENGTH,), (LENGTH,)]), 1, CPU)
    assert mask is not None and mask.attention is None and mask.positions is None and mask.counted == 2
    mask = rules(fewest=LENGTH + 1).mask_of(document_keys([(LENGTH,)]), 1, CPU)
    assert mask is not None and mask.counted == 0


def test_pieces_have_documents_of_their_own() -> None:
    """Of the padded third sequence the second piece is all padding, and has no last token."""
    mask = rules().mask_of({"tokens": torch.zeros(3, LENGTH), **document_keys(PARTS)}, 2, CPU)
    assert mask is not None and mask.attention is not None
    assert mask.attention.lengths == ((10, 6), (6, 10), (4, 12), (10, 6), (2, 12, 2), (16,))
    assert mask.attention.num_tokens == (16, 16, 16, 10, 14, 0) and mask.counted == 5


def test_padding_is_apart_where_documents_are_not() -> None:
    mask = rules(attention=False).mask_of(document_keys(PARTS), 1, CPU)
    assert mask is not None and mask.attention is not None and mask.positions is not None
    assert mask.attention.lengths == ((32,), (26, 6), (14, 18))
    assert mask.positions.lengths[0] == (10, 12, 10)
    whole = rules(attention=False, positions=False).mask_of(document_keys([(10, 22)]), 1, CPU)
    assert whole is not None and whole.attention is None and whole.positions is None


def test_samples_that_do_not_fit_the_settings_are_refused() -> None:
    assert DocumentRules().mask_of({}, 1, CPU) is None
    with pytest.raises(DataError, match=r"data.dataset mine have document_starts, which nothing would obey; set data"):
        DocumentRules(dataset="mine").mask_of(document_keys(PARTS), 1, CPU)
    with pytest.raises(DataError, match=r"data.dataset mine have no document_starts: data.reset_attention_mask and"):
        rules(dataset="mine").mask_of({"tokens": torch.zeros(3, LENGTH)}, 1, CPU)


def test_samples_that_contradict_themselves_are_refused() -> None:
    """The kernels read the starts, attention by document where they begin: what differs would be two masks."""
    starts, tokens = document_keys([(10, 22)]).values()
    for place, wrong in ((0, -1), (12, 9), (12, 0), (31, 11)):
        moved = starts.clone()
        moved[0, place] = wrong
        with pytest.raises(
            DataError, match=rf"data.dataset mine say that the document of token {place} begins at {wrong}"
        ):
            rules(dataset="mine").mask_of({"document_starts": moved, "num_tokens": tokens}, 1, CPU)
    for wrong in (-1, 33):
        with pytest.raises(DataError, match=rf"data.dataset mine have num_tokens \[{wrong}\], not from 0 to their 32"):
            rules(dataset="mine").mask_of({"document_starts": starts, "num_tokens": torch.tensor([wrong])}, 1, CPU)


def test_what_nothing_reads_is_refused() -> None:
    """A registered data set's own mask, say."""
    model = single_model(small_config())
    batch = {**random_sequences(1, LENGTH, 0), "attention_mask": torch.ones(1, LENGTH)}
    with pytest.raises(DataError, match=r"data.dataset indexed have attention_mask, which nothing reads; make them wi"):
        model.inputs(batch, CPU)


def test_a_mask_that_would_be_ignored_is_refused() -> None:
    assert document_mask(None) is None
    model = single_model(small_config())
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="an attention mask of type Tensor would be ignored"):
        model.gpt(tokens, torch.arange(LENGTH)[None], torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"Megatron-Core's own layers know no documents; turn data.reset_attention_m"):
        single_model(small_config(data=BOTH), plain=True)
