"""The library kernel equals the definition, and keeps no score matrix."""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _registry

from megatron_sgt.ops import attention as attention_module
from megatron_sgt.ops.attention import (
    causal_attention,
    causal_attention_reference,
    describe_attention,
    fastest_kernel,
    newer_flash_attention,
    reads_documents,
    reads_groups,
)
from megatron_sgt.ops.document_attention import variable_length_kernel
from tests.helpers.documents import documents_of
from tests.helpers.tensor_shapes import ShapeRecorder

QKV = tuple[Tensor, Tensor, Tensor]
# sequence, batch, heads, groups, head size
SHAPES = [(1, 1, 1, 1, 2), (1, 2, 4, 2, 8), (7, 3, 5, 5, 6), (33, 2, 6, 2, 10), (17, 1, 8, 1, 4)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2}


def random_qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> QKV:
    length, batch, heads, groups, size = shape
    generator = torch.Generator().manual_seed(seed)

    def part(n: int) -> Tensor:
        exact = torch.randn(length, batch, n, size, generator=generator, dtype=torch.float64)
        return exact.to(dtype).requires_grad_()

    return part(heads), part(groups), part(groups)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    qkv = random_qkv(shape, dtype)
    q, k, v = (t.detach().double().requires_grad_() for t in qkv)
    exact = (q, k, v)
    out, wanted = causal_attention(*qkv), causal_attention_reference(*exact)
    assert out.shape == wanted.shape == qkv[0].shape and out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out.double() * weights).sum(), qkv)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), exact)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        # Key and value gradients are sums over up to S rows and N / G heads.
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=0, atol=10 * TOLERANCE[dtype])


def test_the_definition_by_hand() -> None:
    """Two positions, one head: the second weights the values by softmax([1, 3] / sqrt(4))."""
    query = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]).view(2, 1, 1, 4)
    key = torch.tensor([[0.0, 1, 0, 0], [0, 3, 0, 0]]).view(2, 1, 1, 4)
    value = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]).view(2, 1, 1, 4)
    second = torch.softmax(torch.tensor([0.5, 1.5]), 0)
    wanted = torch.tensor([[1.0, 0, 0, 0], [second[0], second[1], 0, 0]]).view(2, 1, 1, 4)
    for attention in (causal_attention, causal_attention_reference):
        torch.testing.assert_close(attention(query, key, value), wanted)


def test_the_future_has_no_influence() -> None:
    query, key, value = (t.detach() for t in random_qkv((9, 2, 4, 2, 8)))
    before = causal_attention(query, key, value)
    query, key, value = (torch.cat([t[:5], t[5:] + 1.0]) for t in (query, key, value))
    after = causal_attention(query, key, value)
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Pretends a GPU of a generation and installed packages; returns the kernels in torch's own order, by name.

    The packages' kernels register without doing anything: which of them torch would take is all that is seen.
    """
    found: list[str] = []

    def order(generation: int, installed: tuple[str, ...] = (), dropout_p: float = 0.0) -> list[str]:
        find = importlib.util.find_spec
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else find(name))
        for name in ("FA3", "FA4"):
            monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, lambda: SimpleNamespace(remove=found.clear))
        newer_flash_attention.cache_clear()
        forget()
        newer_flash_attention(GPU)
        before = torch._C._get_sdp_priority_order()
        with fastest_kernel(GPU, dropout_p):
            allowed = {name for name, on in ENABLED.items() if on()}
            names = [SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]
        assert torch._C._get_sdp_priority_order() == before
        return [name for name in names if name in allowed]

    yield order
    newer_flash_attention.cache_clear()
    forget()


def forget() -> None:
    if torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()


ENABLED = {
    "FLASH_ATTENTION": torch.backends.cuda.flash_sdp_enabled,
    "CUDNN_ATTENTION": torch.backends.cuda.cudnn_sdp_enabled,
    "EFFICIENT_ATTENTION": torch.backends.cuda.mem_efficient_sdp_enabled,
}


@pytest.mark.parametrize(
    ("generation", "installed", "dropout_p", "wanted"),
    [
        (8, (), 0.0, ["FLASH", "EFFICIENT"]),
        (9, (), 0.0, ["CUDNN", "FLASH", "EFFICIENT"]),
        (10, (), 0.0, ["CUDNN", "FLASH", "EFFICIENT"]),
        (8, ("flash_attn_interface",), 0.0, ["FLASH", "EFFICIENT"]),
        (9, ("flash_attn_interface",), 0.0, ["FLASH", "CUDNN", "EFFICIENT"]),
        (9, ("flash_attn",), 0.0, ["CUDNN", "FLASH", "EFFICIENT"]),
        (10, ("flash_attn",), 0.0, ["FLASH", "CUDNN", "EFFICIENT"]),
        (9, ("flash_attn_interface",), 0.1, ["CUDNN", "EFFICIENT"]),
    ],
)
def test_the_order_of_kernels(
    generation: int,
    installed: tuple[str, ...],
    dropout_p: float,
    wanted: list[str],
    gpu: Callable[..., list[str]],
) -> None:
    names = [name.removesuffix("_ATTENTION") for name in gpu(generation, installed, dropout_p)]
    assert names == wanted


def test_amd_has_no_cudnn(gpu: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx942 calls itself 9.4."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu(9, ("flash_attn_interface",)) == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION"]


def test_a_newer_flash_attention_is_named_in_the_log(gpu: Callable[..., list[str]]) -> None:
    gpu(9)
    assert describe_attention(GPU) == "attention: cudnn, flash, efficient, math"
    gpu(9, ("flash_attn_interface",))
    assert describe_attention(GPU) == "attention: flash, cudnn, efficient, math (flash is FA3)"
    assert describe_attention(torch.device("cpu")) == "attention: torch's kernel for cpu"


def test_a_flash_attention_that_does_not_load_is_passed_over(
    gpu: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, ("flash_attn_interface",))

    def broken() -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", broken)
    newer_flash_attention.cache_clear()
    forget()
    wanted = "attention: cudnn, flash, efficient, math (FA3 is not used: undefined symbol)"
    assert describe_attention(GPU) == wanted


def test_the_order_does_not_break_a_graph(gpu: Callable[..., list[str]]) -> None:
    gpu(9, ("flash_attn_interface",))

    def double(x: Tensor) -> Tensor:
        with fastest_kernel(GPU):
            return 2 * x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def test_a_cpu_keeps_torch_s_order() -> None:
    before = torch._C._get_sdp_priority_order()
    with fastest_kernel(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize(
    ("generation", "dtype", "head_size", "dropout_p", "installed", "wanted"),
    [
        (9, torch.bfloat16, 128, 0.0, (), True),
        (8, torch.float16, 64, 0.1, (), True),
        (8, torch.bfloat16, 320, 0.0, (), False),
        (7, torch.float16, 64, 0.0, (), False),  # FlashAttention begins with 8.0
        (9, torch.float32, 128, 0.0, (), False),  # only the memory-efficient kernel takes fp32
        (9, torch.bfloat16, 128, 0.0, ("flash_attn_interface",), True),
        # No flash, and cuDNN takes a dropout of n/16 only.
        (9, torch.bfloat16, 128, 0.1, ("flash_attn_interface",), False),
    ],
)
def test_groups_are_repeated_where_only_the_kernel_with_scores_would_read_them(
    generation: int,
    dtype: torch.dtype,
    head_size: int,
    dropout_p: float,
    installed: tuple[str, ...],
    wanted: bool,
    gpu: Callable[..., list[str]],
) -> None:
    gpu(generation, installed, dropout_p)
    assert reads_groups(GPU, dtype, head_size, dropout_p) == wanted
    assert not reads_groups(torch.device("cpu"), dtype, head_size, dropout_p)
    # torch's variable-length attention is FlashAttention, without dropout.
    assert reads_documents(GPU, dtype, head_size, dropout_p) == (wanted and not dropout_p)


class OnGPU(Tensor):
    """A CPU tensor that says it lies on a GPU."""

    device = GPU  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_grouped_queries_in_fp32_reach_the_kernel_ungrouped(
    dtype: torch.dtype, gpu: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9)
    monkeypatch.setattr(attention_module, "fastest_kernel", lambda device, dropout_p: nullcontext())
    seen: list[tuple[int, int, bool]] = []
    kernel = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.shape[1], k.shape[1], options["enable_gqa"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    qkv = random_qkv((33, 2, 6, 2, 16), dtype)
    out = causal_attention(*(t.as_subclass(OnGPU) for t in qkv)).as_subclass(Tensor)
    assert seen == [(6, 6, False) if dtype == torch.float32 else (6, 2, True)]
    wanted = causal_attention_reference(*(t.double() for t in qkv))
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[dtype])
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out.double() * weights).sum(), qkv)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), qkv)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=10 * TOLERANCE[dtype])


def test_where_documents_are_not_read_in_one_call(
    gpu: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9)
    assert reads_documents(GPU, torch.bfloat16, 128)
    assert not reads_documents(torch.device("cpu"), torch.bfloat16, 128)
    assert not reads_documents(GPU, torch.bfloat16, 100)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not reads_documents(GPU, torch.bfloat16, 128)
    monkeypatch.undo()
    monkeypatch.setattr(attention_module, "variable_length_kernel", lambda: None)
    assert not reads_documents(GPU, torch.bfloat16, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_documents_are_one_call_where_it_runs(
    dtype: torch.dtype, gpu: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the arguments of torch's function attends by the offsets alone. fp32 goes length by length."""
    gpu(9)
    monkeypatch.setattr(attention_module, "fastest_kernel", lambda device, dropout_p: nullcontext())
    signature = inspect.signature(variable_length_kernel())
    calls = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        assert given["window_size"] == (-1, 0) and given["enable_gqa"] and given["max_q"] == given["max_k"] == 20
        assert given["cu_seq_q"] is given["cu_seq_k"]
        calls.append(given["cu_seq_q"].tolist())
        pieces = zip(
            *(given[n].as_subclass(Tensor).split(given["cu_seq_q"].diff().tolist()) for n in ("query", "key", "value")),
            strict=True,
        )
        return torch.cat([causal_attention_reference(*(t[:, None] for t in piece))[:, 0] for piece in pieces])

    monkeypatch.setattr(attention_module, "variable_length_kernel", lambda: kernel)
    documents = documents_of((20, 1, 12), (13, 20))
    qkv = random_qkv((33, 2, 6, 2, 16), dtype)
    out = causal_attention(*(t.as_subclass(OnGPU) for t in qkv), documents=documents).as_subclass(Tensor)
    assert calls == ([] if dtype == torch.float32 else [[0, 20, 21, 33, 46, 66]])
    wanted = causal_attention_reference(*(t.double() for t in qkv), documents=documents)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


def test_no_scores_are_kept_for_any_grouping() -> None:
    length = 48
    for groups in (6, 3, 1):
        query, key, value = random_qkv((length, 2, 6, groups, 5))
        with ShapeRecorder() as recorder:
            causal_attention(query, key, value).sum().backward()
        assert recorder.count > 5
        assert not recorder.with_twice(length)
        with ShapeRecorder() as recorder:  # the recorder does see scores where there are some
            causal_attention_reference(query, key, value)
        assert recorder.with_twice(length)


def test_dropout_scales_the_weights_that_stay() -> None:
    """With values of one, an output is the sum of the kept weights times 1 / (1 - p): 1 on average."""
    query, key, _ = random_qkv((256, 4, 4, 4, 8))
    torch.manual_seed(0)
    out = causal_attention(query, key, torch.ones_like(key), dropout_p=0.25)
    # Late rows weight many positions, so that their sums lie close together.
    assert out[64:].mean().item() == pytest.approx(1.0, abs=0.01)
    assert out.std() > 0.01
    again = causal_attention(query, key, torch.ones_like(key))
    torch.testing.assert_close(again, torch.ones_like(again))
