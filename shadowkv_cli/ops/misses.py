"""The list of a step's missing chunks: what `update_residency` gives to those who bring them."""

from __future__ import annotations

import torch
from torch import Tensor


def list_misses(flags: Tensor) -> tuple[Tensor, Tensor]:
    """List where flags are true.

    Args:
        flags: bool [R, Hk, N].

    Returns:
        int32 [R, Hk, N], the places of the true ones, ascending, then -1, and int32 [R, Hk], how
        many there are.
    """
    row, head, place = flags.nonzero(as_tuple=True)
    order = flags.cumsum(-1)
    listed = torch.full(flags.shape, -1, dtype=torch.int32, device=flags.device)
    listed[row, head, order[row, head, place] - 1] = place.to(torch.int32)
    return listed, flags.sum(-1, dtype=torch.int32)


def missing_places(misses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and place in the selection of every miss, int64 [M] each, in that order."""
    row, head, index = (misses >= 0).nonzero(as_tuple=True)
    return row, head, misses[row, head, index].long()
