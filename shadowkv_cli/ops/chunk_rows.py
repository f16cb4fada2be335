"""Gather whole chunks as rows: several times as fast on a CPU as indexing element by element."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_chunks(source: Tensor, a: Tensor, b: Tensor | int, chunk: Tensor) -> Tensor:
    """Take chunks out of a tensor of any strides whose tokens are equally far apart.

    Args:
        source: [A, B, N, c, D], a view in which the tokens of a chunk, and the first dimensions,
            lie whole numbers of tokens apart, and D is contiguous.
        a, b, chunk: int64 [M], indices of the first three dimensions.

    Returns:
        [M, c, D].
    """
    strides, unit = source.stride(), source.stride(3)
    assert strides[4] == 1, strides
    assert all(stride % unit == 0 for stride in strides[:4]), strides
    first, second, third = (s // unit for s in strides[:3])
    last = sum((n - 1) * s for n, s in zip(source.shape, (first, second, third), strict=False))
    rows = source.as_strided((last + 1, *source.shape[3:]), (unit, unit, 1))
    return rows.index_select(0, torch.as_tensor(a * first + b * second + chunk * third))
