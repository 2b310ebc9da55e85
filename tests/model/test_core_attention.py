"""The module in Megatron's core-attention slot: layout, gates, entropy, recompute, dropout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.compat.megatron_cpu import prepare_megatron
from megatron_sgt.model.core_attention import SGTCoreAttention
from megatron_sgt.model.documents import DocumentMask
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.ops.attention import causal_attention_reference
from megatron_sgt.ops.entropy import last_row_entropy
from megatron_sgt.parallel.rng import seed_for_training
from tests.helpers.documents import documents_of
from tests.helpers.fake_groups import fake_groups

CPU = torch.device("cpu")
LENGTH, BATCH, HEADS, GROUPS, SIZE = 9, 2, 4, 2, 6
DOCUMENTS = documents_of((4, 3, 2), (1, 8), padding=(2, 0))
MASK = DocumentMask(DOCUMENTS, DOCUMENTS, 2, 2)


@pytest.fixture(autouse=True)
def tracker_on_the_cpu() -> None:
    prepare_megatron(CPU)
    seed_for_training(1, fake_groups())


def core_attention(recompute: bool = False, dropout: float = 0.0) -> SGTCoreAttention:
    meter = EntropyMeter(5, 3, HeadLayout(HEADS, GROUPS, SIZE), CPU)
    meter.enabled = True
    settings: Any = SimpleNamespace(attention_dropout=dropout)
    # What Megatron passes besides is ignored.
    layers = (2,) if recompute else ()
    return SGTCoreAttention(settings, 3, meter, layers, attn_mask_type=None, attention_type="self").train()


def random_qkv(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(LENGTH, BATCH, n, SIZE, generator=generator).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]


def table(core: SGTCoreAttention) -> Any:
    core.meter.end_micro_batch()
    return core.meter.reduce(fake_groups())


@pytest.mark.parametrize("recompute", [False, True])
def test_ordinary_pass(recompute: bool) -> None:
    core, qkv = core_attention(recompute), random_qkv()
    out = core(*qkv, None, packed_seq_params=None, attention_bias=None)
    wanted = causal_attention_reference(*qkv).reshape(LENGTH, BATCH, HEADS * SIZE)
    torch.testing.assert_close(out, wanted)
    pull = torch.randn_like(out)
    for grad, wanted_grad in zip(
        torch.autograd.grad((out * pull).sum(), qkv),
        torch.autograd.grad((wanted * pull).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted_grad)
    measured = table(core)
    # Megatron's layer 3 is layer 2 of the table.
    assert measured[2, 0] == pytest.approx(last_row_entropy(*qkv[:2]).numpy(), abs=1e-7)
    measured[2, 0] = 0.0
    assert not measured.any()


def test_documents() -> None:
    """Of every sequence the last document before the padding is measured; sums for the meter, not means."""
    core, qkv = core_attention(), random_qkv()
    out = core(*qkv, MASK)
    wanted = causal_attention_reference(*qkv, DOCUMENTS).reshape(LENGTH, BATCH, HEADS * SIZE)
    torch.testing.assert_close(out, wanted)
    entropies = [
        last_row_entropy(*(t[part, row : row + 1] for t in qkv[:2]))
        for row, part in ((0, slice(4, 7)), (1, slice(1, 9)))
    ]
    assert table(core)[2, 0] == pytest.approx(sum(entropies).numpy(), abs=1e-6)
    core(*qkv, DocumentMask(None, None, 2, 2))  # whole sequences in a run of documents
    assert table(core)[2, 0] == pytest.approx(2 * last_row_entropy(*qkv[:2]).numpy(), abs=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_loop_pass(recompute: bool) -> None:
    core, qkv = core_attention(recompute), random_qkv()
    gates = torch.tensor([1.0, 0.5, 0.0, 0.25])
    with core.loop_pass(2, gates):
        out = core(*qkv)
    wanted = (causal_attention_reference(*qkv) * gates[:, None]).reshape(out.shape)
    torch.testing.assert_close(out, wanted)
    # The backward pass runs when the pass is no longer marked; the gates must not be lost with it.
    grad, wanted_grad = (torch.autograd.grad((y**2).sum(), qkv[2])[0] for y in (out, wanted))
    torch.testing.assert_close(grad, wanted_grad)
    measured = table(core)
    assert measured[2, 2] == pytest.approx(last_row_entropy(*qkv[:2]).numpy(), abs=1e-7)
    assert not measured[2, :2].any()


def test_gates_keep_the_type_of_the_activations() -> None:
    core = core_attention()
    qkv = [t.detach().bfloat16() for t in random_qkv()]
    with core.loop_pass(1, torch.full((HEADS,), 0.3)):
        assert core(*qkv).dtype == torch.bfloat16


def test_the_mark_of_a_pass_ends_with_it() -> None:
    core, qkv = core_attention(), random_qkv()
    before = core(*qkv)
    with pytest.raises(RuntimeError, match="out of memory"), core.loop_pass(1, torch.zeros(HEADS)):
        raise RuntimeError("out of memory")
    assert torch.equal(core(*qkv), before)
    assert not table(core)[2, 1].any()


@pytest.mark.parametrize(("training", "enabled"), [(False, True), (True, False)])
def test_entropy_is_measured_in_training_and_when_asked(training: bool, enabled: bool) -> None:
    core = core_attention().train(training)
    core.meter.enabled = enabled
    core(*random_qkv())
    core.meter.enabled = True
    assert not table(core).any()


def test_a_mask_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match="an attention mask of type Tensor would be ignored"):
        core_attention()(*random_qkv(), torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))


def test_packed_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="packed sequences are not supported"):
        core_attention()(*random_qkv(), packed_seq_params=object())


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_draws_from_the_ranks_own_stream(recompute: bool) -> None:
    def run(tp_rank: int, noise: int) -> tuple[Tensor, Tensor]:
        core, qkv = core_attention(recompute, dropout=0.5), random_qkv()
        seed_for_training(1, fake_groups(tp_rank, 2))
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        out = core(*qkv)
        assert torch.equal(torch.get_rng_state(), state)
        return out.detach(), torch.autograd.grad((out * out.detach()).sum(), qkv[2])[0]

    first, other_noise, other_rank = run(0, 1), run(0, 2), run(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, other_noise, strict=True))
    assert not torch.equal(first[0], other_rank[0])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "documents"])
def test_recompute_repeats_the_dropout_mask(mask: DocumentMask | None) -> None:
    def run(recompute: bool) -> list[Tensor]:
        core, qkv = core_attention(recompute, dropout=0.5), random_qkv()
        seed_for_training(1, fake_groups())
        out = core(*qkv, mask)
        after = core(*qkv, mask)  # the stream moved on as it does without recompute
        loss = (out * out.detach()).sum()
        once, twice = (torch.autograd.grad(loss, qkv, retain_graph=True) for _ in range(2))
        return [out, after, *once, *twice]

    for ordinary, recomputed in zip(run(False), run(True), strict=True):
        assert torch.equal(ordinary, recomputed)


def test_the_stream_after_a_recomputed_backward_pass() -> None:
    """Drawing the mask again must not move the stream that later masks come from."""

    def next_number(recompute: bool) -> float:
        core, qkv = core_attention(recompute, dropout=0.5), random_qkv()
        seed_for_training(1, fake_groups())
        first, _ = core(*qkv), core(*qkv)
        first.sum().backward()  # goes back to the first mask while the stream is behind the second
        with get_cuda_rng_tracker().fork():
            return torch.rand(()).item()

    assert next_number(True) == next_number(False)


def test_no_dropout_in_evaluation() -> None:
    core, qkv = core_attention(dropout=0.5).eval(), random_qkv()
    torch.testing.assert_close(core(*qkv), causal_attention_reference(*qkv).reshape(LENGTH, BATCH, -1))
