"""Host memory that a GPU can read by itself, of exactly the size that is asked for.

Pinning 100 GB takes a minute, so what an owner leaves behind is kept for the next one.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from shadowkv_cli.errors import OutOfHostMemory

PAGE_BYTES = 4096

_idle: list[Tensor] = []
"""Pinned blocks that have no owner any more."""

_registered: set[int] = set()
"""Addresses of all pinned blocks."""


def idle_bytes() -> int:
    """Pinned memory that whoever asks next may have."""
    return sum(block.numel() for block in _idle)


def host_memory(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of the host in large pages where the system has them: they are quicker to pin.

    Pinned memory that is idle, if it is large enough; else all that is idle is given back first.
    """
    count = math.prod(size) * dtype.itemsize
    if not count:
        return torch.empty(tuple(size), dtype=dtype)
    block = _take_idle(count)
    if block is None:
        _give_back()
        block = _map(count)
    return block[:count].view(dtype).view(tuple(size))


def _map(count: int) -> Tensor:
    memory = mmap.mmap(-1, count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages: small ones do the same
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _take_idle(count: int) -> Tensor | None:
    """The smallest idle block that holds so many bytes."""
    fitting = [place for place, block in enumerate(_idle) if block.numel() >= count]
    return _idle.pop(min(fitting, key=lambda i: _idle[i].numel())) if fitting else None


def _give_back() -> None:
    for block in _idle:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
        _registered.remove(block.data_ptr())
    _idle.clear()


def _whole(tensor: Tensor) -> Tensor:
    """All bytes of the block that a tensor of `host_memory` lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def pin(tensors: Sequence[Tensor], owner: object) -> None:
    """Pin tensors of `host_memory` for as long as their owner lives; they must not outlive it.

    torch's own pinned memory comes in powers of two: of 128 GiB that is too much. Raises
    OutOfHostMemory where the system refuses to pin so much.
    """
    runtime = torch.cuda.cudart()
    pinned: list[Tensor] = []
    weakref.finalize(owner, _leave, pinned)
    for tensor in tensors:
        if not tensor.numel():
            continue
        block = _whole(tensor)
        if block.data_ptr() not in _registered:
            # Touched here, on all cores; pinning would do it on one.
            block[::PAGE_BYTES] = 0
            status = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
            if status:
                raise OutOfHostMemory(
                    f"Cannot pin {block.nbytes / 1e9:.1f} GB of host memory after {len(pinned)} "
                    f"pieces of that size (CUDA error {status}): use a smaller batch, or raise the "
                    "limit of locked memory (ulimit -l)."
                )
            _registered.add(block.data_ptr())
        pinned.append(block)


def _leave(blocks: list[Tensor]) -> None:
    """The owner is gone: its blocks are idle as soon as nothing reads them any more."""
    torch.cuda.synchronize()
    _idle.extend(blocks)
