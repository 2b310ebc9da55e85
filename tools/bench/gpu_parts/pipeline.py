"""What one GPU can run of a pipeline: a backward pass from an output that was given away, Megatron-Core's settings.

Two stages need two GPUs: NCCL refuses two ranks on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

from gpu_parts.machine import Machine
from megatron_sgt.compat.megatron_pipeline import backward_from
from megatron_sgt.config import parse_config
from megatron_sgt.model.mcore_config import transformer_config


def given_away(machine: Machine) -> Iterator[dict[str, Any]]:
    """A received gradient enters at an output whose memory has been freed, with the bits of an ordinary pass."""
    width, tokens = (16, 8) if machine.dry else (1024, 4096)
    layer = torch.nn.Linear(width, width, device=machine.device, dtype=machine.dtype)
    hidden = torch.randn(tokens, width, device=machine.device, dtype=machine.dtype, requires_grad=True)
    received = torch.randn(tokens, width, device=machine.device, dtype=machine.dtype)
    leaves = (hidden, layer.weight)
    wanted = torch.autograd.grad(torch.nn.functional.silu(layer(hidden)), leaves, received)
    output = torch.nn.functional.silu(layer(hidden))
    deallocate_output_tensor(output, True)
    found = torch.autograd.grad(backward_from(output, received), leaves)
    same = output.numel() == 1 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    yield {"check": "backward pass from an output that was sent", "passed": same, "detail": ""}


def settings(machine: Machine) -> Iterator[dict[str, Any]]:
    """Megatron-Core accepts the settings of pipelines for this device, and sends as it must."""
    model = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "seq_length": 32,
             "vocab_size": 128}  # fmt: skip
    train = {"train_iters": 4, "micro_batch_size": 1, "global_batch_size": 8}
    passed, told, gpu = True, [], machine.device.type == "cuda"
    for virtual in (1, 2):
        parallel = {"device": machine.device.type, "pipeline_model_parallel_size": 2,
                    "virtual_pipeline_model_parallel_size": virtual}  # fmt: skip
        config = parse_config({"model": model, "optim": {"lr": 1e-3}, "train": train, "parallel": parallel})
        made = transformer_config(config, "bf16", machine.device)
        passed &= made.batch_p2p_comm == (virtual == 1) and made.overlap_p2p_comm == (virtual == 2)
        passed &= made.batch_p2p_sync == gpu and made.deallocate_pipeline_outputs == (virtual == 1)
        told.append(f"{virtual} per stage: {'overlapped' if made.overlap_p2p_comm else 'batched'}")
    yield {"check": "settings of a pipeline", "passed": passed, "detail": "; ".join(told)}
