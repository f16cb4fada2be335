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

from shadowkv_cli.console import format_bytes
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

    def take(self, *rooms: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
        """A tensor that holds anything for each size and dtype.

        Pinned memory that is idle serves where it is large enough, but never so that more is pinned
        in the end than is asked for or was pinned before; if it does not serve all, the rest of it
        is given back first. Raises OutOfHostMemory where the system refuses to pin so much.
        """
        counts = [math.prod(size) * dtype.itemsize for size, dtype in rooms]
        found: list[Tensor | None] = [None] * len(counts)
        if self._pinned:
            found = _take_idle(counts)
            # Theirs from here on: whatever fails, they are idle again when the owner is gone.
            self._blocks += [block for block in found if block is not None]
            if any(block is None and count for block, count in zip(found, counts, strict=True)):
                _give_back()
        return [
            self._space(block, count)[:count].view(dtype).view(tuple(size))
            for (size, dtype), count, block in zip(rooms, counts, found, strict=True)
        ]

    def _space(self, block: Tensor | None, count: int) -> Tensor:
        """So many bytes, or more where a block is there already."""
        if block is not None:
            return block
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        new = self._pin_new(count) if self._pinned else _map(count)
        self._blocks.append(new)
        return new

    def _pin_new(self, count: int) -> Tensor:
        """Pin a block; torch's own come in powers of two: of 128 GiB that is too much."""
        block = _map(count)
        # Touched here, on all cores; pinning would do it on one.
        block[::PAGE_BYTES] = 0
        status = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), count, 0))
        if status:
            held = sum(own.numel() for own in self._blocks)
            raise OutOfHostMemory(
                f"Cannot pin {format_bytes(count)} of host memory beside {format_bytes(held)} that "
                f"are pinned (CUDA error {status}): use a smaller batch, or raise the limit of "
                "locked memory (ulimit -l)."
            )
        return block


def _map(count: int) -> Tensor:
    memory = mmap.mmap(-1, count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages: small ones do the same
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _take_idle(counts: Sequence[int]) -> list[Tensor | None]:
    """For each number of bytes the smallest idle block that holds it, if one may be used for it.

    What blocks are too large by is lost to their owner, so all together may be that by no more than
    is idle beyond what is asked for.
    """
    found: list[Tensor | None] = [None] * len(counts)
    spare = max(idle_bytes() - sum(counts), 0)
    for place in sorted(range(len(counts)), key=lambda i: -counts[i]):
        count = counts[place]
        fitting = [
            i for i, block in enumerate(_idle) if 0 < count <= block.numel() <= count + spare
        ]
        if fitting:
            block = _idle.pop(min(fitting, key=lambda i: _idle[i].numel()))
            spare -= block.numel() - count
            found[place] = block
    return found


def _give_back() -> None:
    while _idle:
        block = _idle.pop()
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


def _leave(blocks: list[Tensor]) -> None:
    """The owner is gone: its blocks are idle as soon as nothing reads them any more."""
    if blocks:
        torch.cuda.synchronize()
        _idle.extend(blocks)
