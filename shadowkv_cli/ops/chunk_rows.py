"""Gather whole chunks as rows: several times as fast on a CPU as indexing element by element."""

from __future__ import annotations

import math

from torch import Tensor


def gather_chunks(source: Tensor, *where: Tensor) -> Tensor:
    """Take chunks out of a tensor of any strides whose tokens are equally far apart.

    Args:
        source: [..., c, D], a view in which the tokens of a chunk, and the first dimensions, lie
            whole numbers of tokens apart, and D is contiguous.
        where: int64 [M], one index for each of the first dimensions.

    Returns:
        [M, c, D].
    """
    *strides, unit, one = source.stride()
    assert one == 1, source.stride()
    if source.shape[-2] == 1:
        unit = math.gcd(*strides)  # the stride within a chunk of one token says nothing
    assert all(stride % unit == 0 for stride in strides), source.stride()
    steps = [stride // unit for stride in strides]
    last = sum((size - 1) * step for size, step in zip(source.shape, steps, strict=False))
    rows = source.as_strided((last + 1, *source.shape[-2:]), (unit, unit, 1))
    # A dimension of one element adds nothing, whatever its stride.
    parts = [
        index * step
        for index, step, size in zip(where, steps, source.shape, strict=False)
        if size > 1
    ]
    return rows.index_select(0, sum(parts[1:], parts[0]) if parts else where[0])
