"""A rank's device and the matching collective backend."""

from __future__ import annotations

import sys
import weakref

import torch

from megatron_sgt.errors import ConfigError, first_line

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every GPU of the process."""


def device_type(wanted: str) -> str:
    """Return the type of device that ``wanted`` (see ``select_device``) means here; does not start CUDA.

    Raises:
        ConfigError: CUDA was asked for and is absent.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("parallel.device is cuda but torch sees no GPU; use parallel.device=cpu or auto")
    return "cuda"


def select_device(wanted: str, local_rank: int, local_ranks: int = 1) -> torch.device:
    """Return this rank's device, and make it the current one.

    A rank that sees a single GPU uses it (``--gpus-per-task=1``, its own ``CUDA_VISIBLE_DEVICES``), whatever its local
    rank; ``parallel.placement`` checks that no other rank has the same one.

    Args:
        wanted: "auto" (CUDA when present), "cpu" or "cuda".
        local_rank: rank among the processes of this host.
        local_ranks: processes of this host.

    Raises:
        ConfigError: CUDA was asked for and is absent or does not start, or ranks see several GPUs but not one each.
    """
    if device_type(wanted) == "cpu":
        return torch.device("cpu")
    try:
        torch.cuda.init()  # afterwards the count is CUDA's own; before, torch asks the driver, which ignores MIG
        visible = torch.cuda.device_count()
        if visible == 0:
            raise RuntimeError("CUDA finds no device")
    except RuntimeError as error:
        raise ConfigError(
            f"torch cannot start the GPU ({first_line(error)}); compare its CUDA version with the driver's "
            "(nvidia-smi), or use parallel.device=cpu"
        ) from error
    if 1 < visible < max(local_ranks, local_rank + 1):
        raise ConfigError(
            f"{local_ranks} ranks on this host, but local rank {local_rank} sees {visible} GPUs: "
            "start at most one rank per GPU, and let every rank see all of the host's GPUs or one of its own"
        )
    index = 0 if visible == 1 else local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def identity(device: torch.device) -> str | None:
    """A unique name: the UUID of a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def backend_for(device: torch.device) -> str:
    """Name of the torch.distributed backend for ``device``: nccl on GPUs, gloo on CPUs."""
    return "nccl" if device.type == "cuda" else "gloo"


def memory_gb(device: torch.device) -> tuple[float | None, float | None]:
    """Peak allocated and total memory of ``device`` in GB (1e9 bytes); (None, None) on a CPU."""
    if device.type != "cuda":
        return None, None
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9


def device_name(device: torch.device) -> str:
    """Marketing name of the device, for the table of peak rates."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work queued so far (no-op on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty_caches(device: torch.device) -> None:
    """Return memory that torch keeps for tensors that are gone, and forget what it has compiled for their shapes.

    On a CPU torch keeps no memory.
    """
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:  # its import takes seconds
        dynamo.reset()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # page-locked host memory


def lock_pages(memory: torch.Tensor) -> None:
    """Page-lock existing host memory, so that GPUs copy to it at full speed.

    It must not be freed while it is locked.

    Raises:
        RuntimeError: the system refuses.
    """
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
    if error:
        raise RuntimeError(f"cudaHostRegister: error {error}")
    weakref.finalize(memory.untyped_storage(), _unlock_pages, memory.data_ptr()).atexit = False


def _unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
