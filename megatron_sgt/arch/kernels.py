"""What differs between devices in what operations keep for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """Kinds of kernels, as far as memory goes.

    ``norm_copies``: copies of its input's size that RMSNorm keeps beside the input (composite kernels keep the
    normalised one); ``mask_bytes``: of one element's dropout mask (None: as many as an element has); ``cuts_keys``:
    balanced loops keep keys and values as cut and copied for this rank, not as gathered; ``groups``: attention in 16
    bits reads grouped keys and values, which are repeated otherwise.
    """

    norm_copies: int
    mask_bytes: int | None
    cuts_keys: bool
    groups: bool


GPU = Kernels(norm_copies=0, mask_bytes=1, cuts_keys=False, groups=True)
CPU = Kernels(norm_copies=1, mask_bytes=None, cuts_keys=True, groups=False)
