"""The list of a step's missing chunks: what `update_residency` gives to those who bring them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Missing(NamedTuple):
    """Every miss of a step, int64 [M] each, ordered by the first two dimensions of the list."""

    first: Tensor  # its index in the list's first dimension
    second: Tensor
    chunk: Tensor
    slot: Tensor


def list_misses(flags: Tensor) -> tuple[Tensor, Tensor]:
    """List where flags are true.

    Args:
        flags: bool [R, Hk, N].

    Returns:
        int32 [R, Hk, N], the places of the true ones, ascending, then -1, and int32 [R, Hk], how
        many there are.
    """
    return list_places(flags.reshape(-1).nonzero()[:, 0], flags)


def list_places(flat: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """The same, given where they are as places of all flags in a row: int64 [M]."""
    wanted = flags.shape[-1]
    order = flags.cumsum(-1).view(-1).index_select(0, flat)
    place = flat % wanted
    listed = torch.full(flags.shape, -1, dtype=torch.int32, device=flags.device)
    listed.view(-1).index_copy_(0, flat - place + order - 1, place.to(torch.int32))
    return listed, flags.sum(-1, dtype=torch.int32)


def missing_places(misses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and place in the selection of every miss, int64 [M] each, in that order."""
    row, head, index = (misses >= 0).nonzero(as_tuple=True)
    return row, head, misses[row, head, index].long()


def missing_chunks(misses: Tensor, ids: Tensor, slots: Tensor) -> Missing:
    """What has to be brought, and where to.

    Args:
        misses, ids, slots: int32 [A, B, N], of the same rows and heads in either order.
    """
    second, wanted = misses.shape[1:]
    flat = misses.reshape(-1)
    at = (flat >= 0).nonzero()[:, 0]
    plane = at.div(wanted, rounding_mode="floor")
    selected = plane * wanted + flat.index_select(0, at)
    first = plane.div(second, rounding_mode="floor")
    chunk, slot = (x.reshape(-1).index_select(0, selected).long() for x in (ids, slots))
    return Missing(first, plane - first * second, chunk, slot)
