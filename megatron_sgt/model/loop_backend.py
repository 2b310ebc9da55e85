"""Which kernels a run's loops go through, from its configuration and device, with the reason in one line."""

from __future__ import annotations

import torch

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.mcore_config import DTYPES
from megatron_sgt.ops.backend import Backend, BackendError, LoopShape, choose_attention, choose_backend
from megatron_sgt.ops.tiles import arch_of
from megatron_sgt.planning.structure import most_kept_heads


def loop_backend(config: Config, precision: str, device: torch.device) -> tuple[Backend, str]:
    """The backend of the sparse loop, and a line for the log: what was chosen and why.

    Args:
        precision: "fp32", "bf16" or "fp16", already resolved for the device.

    Raises:
        ConfigError: ``train.loop_backend`` is triton, or ``train.loop_attention`` custom, which cannot run here.
    """
    model, train = config.model, config.train
    shape = LoopShape(
        device=device,
        dtype=DTYPES[precision],
        head_size=model.kv_channels,
        norm=model.normalization,
        norm_position=model.norm_position,
        norms_all_heads=model.norms_all_heads,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
    )
    try:
        backend, line = choose_backend(train.loop_backend, shape)
        if train.loop_attention == "custom" and backend != "triton":
            raise BackendError(f"train.loop_attention is custom, which needs Triton kernels, but {line}")
    except BackendError as error:
        raise ConfigError(str(error)) from error
    if backend == "triton":
        heads, wanted = most_kept_heads(config), train.loop_attention
        arch = arch_of(torch.empty(0, device=device))
        for length in config.seq_lengths.every:
            sequences = train.micro_batch_size * (model.seq_length // length)
            kind = choose_attention(sequences * heads, length, model.kv_channels, arch, wanted)
            line += (
                f"; attention of {sequences} x {heads} heads of size {model.kv_channels} "
                f"over {length} tokens: {kind}{'' if wanted == 'auto' else ' (train.loop_attention)'}"
            )
    return backend, line
