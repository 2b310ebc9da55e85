"""Full-length samples as shorter training sequences (data.seq_length_curriculum)."""

import torch

from megatron_sgt.data.loader import MicroBatch


def cut(batch: MicroBatch, pieces: int) -> MicroBatch:
    """``batch`` [B, T] with every sample cut into ``pieces`` consecutive sequences: [B · pieces, T / pieces].

    Labels were shifted before, so that each token is predicted once, as without a cut, from the tokens of its own
    piece. Tokens are not copied; positions, where there are any, begin at 0 in each piece, and so does a document that
    was cut. With one piece, or of nothing, it is ``batch`` itself.
    """
    if pieces == 1 or not batch:
        return batch
    parts = {name: tensor.reshape(len(tensor) * pieces, -1) for name, tensor in batch.items() if name != "num_tokens"}
    any_of_them = next(iter(parts.values()))
    length = any_of_them.shape[1]
    place = torch.arange(length, device=any_of_them.device)
    restart: torch.Tensor | int = 0
    if (starts := parts.get("document_starts")) is not None:
        begins = torch.arange(0, length * pieces, length, dtype=starts.dtype, device=starts.device)
        shifts = begins.repeat(len(batch["document_starts"]))[:, None]
        parts["document_starts"] = (starts - shifts).clamp(min=0)
        parts["num_tokens"] = (batch["num_tokens"][:, None] - begins).clamp(0, length).flatten()
        if "position_ids" in parts:
            restarted = parts["position_ids"] == place + shifts - starts  # not where positions go on past documents
            restart = parts["document_starts"] * restarted
    if (old := parts.get("position_ids")) is not None:
        parts["position_ids"] = (place - restart).expand_as(old)
    return parts
