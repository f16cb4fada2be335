"""Host memory that a GPU can read by itself, of exactly the size that is asked for."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from shadowkv_cli.errors import ShadowKVError

PAGE_BYTES = 4096


def host_memory(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of the host in large pages where the system has them: they are quicker to pin."""
    count = math.prod(size)
    if not count:
        return torch.empty(tuple(size), dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages: small ones do the same
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(size))


def pin(tensors: Sequence[Tensor], owner: object) -> None:
    """Pin tensors of `host_memory` until their owner goes.

    torch's own pinned memory comes in powers of two, and what is given back is kept: of 128 GiB
    that is too much. Raises ShadowKVError where the system refuses to pin so much.
    """
    runtime = torch.cuda.cudart()
    pinned: list[int] = []
    weakref.finalize(owner, _unpin, pinned)
    for tensor in tensors:
        if not tensor.numel():
            continue
        # Touched here, on all cores; pinning would do it on one.
        tensor.view(-1).view(torch.uint8)[::PAGE_BYTES] = 0
        status = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if status:
            raise ShadowKVError(
                f"Cannot pin {tensor.nbytes / 1e9:.1f} GB of host memory after "
                f"{len(pinned)} pieces of that size (CUDA error {status}): use a smaller batch, or "
                "raise the limit of locked memory (ulimit -l)."
            )
        pinned.append(tensor.data_ptr())


def _unpin(addresses: list[int]) -> None:
    torch.cuda.synchronize()  # whatever still reads them
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
