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


def idle_bytes() -> int:
    """Pinned memory that whoever asks next may have."""
    return sum(block.numel() for block in _idle)


class HostMemory:
    """Memory of the host, in large pages where the system has them: they are quicker to pin.

    What is taken from it must not outlive it: a pinned block then goes to the next owner.
    """

    def __init__(self, *, pinned: bool) -> None:
        """Begin with nothing; pinned memory needs a GPU."""
        self._pinned = pinned
        self._blocks: list[Tensor] = []
        if pinned:
            weakref.finalize(self, _leave, self._blocks)

    def take(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that holds anything.

        Pinned memory that is idle, if it is large enough; else all that is idle is given back
        first. Raises OutOfHostMemory where the system refuses to pin so much.
        """
        count = math.prod(size) * dtype.itemsize
        if not count:
            return torch.empty(tuple(size), dtype=dtype)
        block = _take_idle(count) if self._pinned else None
        if block is None:
            block = self._pin_new(count) if self._pinned else _map(count)
        self._blocks.append(block)
        return block[:count].view(dtype).view(tuple(size))

    def _pin_new(self, count: int) -> Tensor:
        """Pin a block; torch's own come in powers of two: of 128 GiB that is too much."""
        _give_back()
        block = _map(count)
        # Touched here, on all cores; pinning would do it on one.
        block[::PAGE_BYTES] = 0
        status = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), count, 0))
        if status:
            raise OutOfHostMemory(
                f"Cannot pin {count / 1e9:.1f} GB of host memory after {len(self._blocks)} pieces "
                f"of that size (CUDA error {status}): use a smaller batch, or raise the limit of "
                "locked memory (ulimit -l)."
            )
        return block


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
    while _idle:
        block = _idle.pop()
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


def _leave(blocks: list[Tensor]) -> None:
    """The owner is gone: its blocks are idle as soon as nothing reads them any more."""
    if blocks:
        torch.cuda.synchronize()
        _idle.extend(blocks)
