"""Full-length samples as shorter training sequences (data.seq_length_curriculum)."""

import torch

from megatron_sgt.data.loader import MicroBatch


def cut(batch: MicroBatch, pieces: int) -> MicroBatch:
    """``batch`` [B, T] with every sample cut into ``pieces`` consecutive sequences: [B · pieces, T / pieces].

    Labels were shifted before, so that each token is predicted once, as without a cut, from the tokens of its own
    piece. Nothing is copied; positions begin at 0 in each piece. With one piece it is ``batch`` itself.
    """
    if pieces == 1:
        return batch
    parts = {name: tensor.reshape(len(tensor) * pieces, -1) for name, tensor in batch.items()}
    tokens = parts["tokens"]
    return parts | {"position_ids": torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)}
