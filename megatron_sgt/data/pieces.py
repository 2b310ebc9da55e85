"""Full-length samples as shorter training sequences (data.seq_length_curriculum)."""

import torch

from megatron_sgt.data.loader import MicroBatch


def cut(batch: MicroBatch, pieces: int) -> MicroBatch:
    """``batch`` [B, T] with every sample cut into ``pieces`` consecutive sequences: [B · pieces, T / pieces].

    Labels were shifted before, so that each token is predicted once, as without a cut, from the tokens of its own
    piece. Nothing is copied; positions, where there are any, begin at 0 in each piece. With one piece it is ``batch``
    itself.
    """
    if pieces == 1:
        return batch
    parts = {name: tensor.reshape(len(tensor) * pieces, -1) for name, tensor in batch.items()}
    if (old := parts.get("position_ids")) is not None:
        parts["position_ids"] = torch.arange(old.shape[1], device=old.device).expand_as(old)
    return parts
