"""How fast a GPU gathers scattered rows from pinned host memory, reading it by pointer.

This is how missed chunks of values reach the GPU: 8 tokens x 128 dimensions x 2 bytes are 2 KiB.
A Triton kernel stands in until the compiled ones measure themselves.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BYTES = 2048
ROW_WORDS = ROW_BYTES // 8
NUM_ROWS = 131_072
"""256 MiB: well beyond a GPU's cache, so that every row comes over the bus."""

ROWS_AT_ONCE = 8
PROGRAMS = 128


# Triton refuses annotations of types that it does not know.
@triton.jit
def _gather_kernel(source, rows, out, count, ROWS_AT_ONCE: tl.constexpr, ROW_WORDS: tl.constexpr):
    words = tl.arange(0, ROW_WORDS)
    stride = tl.num_programs(0) * ROWS_AT_ONCE
    for start in range(tl.program_id(0) * ROWS_AT_ONCE, count, stride):
        places = start + tl.arange(0, ROWS_AT_ONCE)
        inside = places < count
        row = tl.load(rows + places, mask=inside, other=0)
        read = row[:, None] * ROW_WORDS + words[None, :]
        write = places.to(tl.int64)[:, None] * ROW_WORDS + words[None, :]
        data = tl.load(source + read, mask=inside[:, None])
        tl.store(out + write, data, mask=inside[:, None])


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> None:
    """Write `source[rows]` to `out` without a copy of `source`.

    Args:
        source: int64 [N, ROW_WORDS], pinned host memory. The driver maps it into the GPU's address
            space; Triton's launcher asks the driver and refuses memory that is not mapped.
        rows: int64 [M] on the GPU.
        out: int64 [M, ROW_WORDS] on the GPU.
    """
    assert source.is_pinned()
    assert rows.is_cuda
    assert out.is_cuda
    with torch.cuda.device(out.device):
        _gather_kernel[(PROGRAMS,)](
            source, rows, out, rows.numel(), ROWS_AT_ONCE, ROW_WORDS, num_warps=8
        )


def measure_gather_gb_s(
    device: torch.device, fastest_s: Callable[[torch.device, Callable[[], object]], float]
) -> tuple[float | None, str]:
    """GB/s of the gather in random order, or None and why it could not be measured.

    Args:
        device: a GPU.
        fastest_s: seconds of a piece of work there.
    """
    try:
        source = torch.arange(NUM_ROWS * ROW_WORDS).view(NUM_ROWS, ROW_WORDS).pin_memory()
        rows = torch.randperm(NUM_ROWS).to(device)
        out = torch.empty(NUM_ROWS, ROW_WORDS, dtype=torch.int64, device=device)
        gather_rows(source, rows, out)
        if not torch.equal(out[:, 0], rows * ROW_WORDS):
            return None, "the gather returned other rows than it was asked for"
        seconds = fastest_s(device, lambda: gather_rows(source, rows, out))
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        # Without a C compiler, Triton can't build its launcher.
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return NUM_ROWS * ROW_BYTES / seconds / 1e9, ""
