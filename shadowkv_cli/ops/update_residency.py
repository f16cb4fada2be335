"""Which selected chunks are at hand already, and where the others go."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.misses import list_places


def _reference(
    ids: Tensor, step: Tensor, chunk_of_slot: Tensor, last_used: Tensor, slot_of_chunk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    slots_held, wanted = chunk_of_slot.shape[-1], ids.shape[-1]
    check(
        slots_held >= wanted,
        "update_residency",
        f"chunk_of_slot holds {slots_held} slots, fewer than the {wanted} chunks selected",
    )
    index = ids.clamp_min(0).long()
    slots = slot_of_chunk.gather(2, index).masked_fill_(ids < 0, -1)
    hit = slots >= 0
    now = step[:, None, None]
    # What is no hit points to slot 0, which -1 leaves as it is.
    used = torch.where(hit, now, -1)
    last_used.scatter_reduce_(2, slots.clamp_min(0).long(), used, "amax")
    missing = (ids >= 0) & ~hit
    new = missing.view(-1).nonzero()[:, 0]
    misses, counts = list_places(new, missing)
    if not new.numel():
        return slots, misses, counts
    free = _freed(last_used, now, counts).view(-1).nonzero()[:, 0]
    # Both are ordered by plane, with as many of each: the j-th chunk takes the j-th slot.
    plane = new.div(wanted, rounding_mode="floor")
    taken = (free - plane * slots_held).to(torch.int32)
    chunk = index.view(-1).index_select(0, new)
    evicted = chunk_of_slot.view(-1).index_select(0, free).long()
    slot_of, first = slot_of_chunk.view(-1), plane * slot_of_chunk.shape[-1]
    # Of a slot that held nothing nothing goes; the chunk that comes has no slot yet.
    slot_of.index_fill_(0, first + torch.where(evicted >= 0, evicted, chunk), -1)
    slot_of.index_copy_(0, first + chunk, taken)
    chunk_of_slot.view(-1).index_copy_(0, free, chunk.to(torch.int32))
    row = plane.div(ids.shape[1], rounding_mode="floor")
    last_used.view(-1).index_copy_(0, free, step.index_select(0, row))
    slots.view(-1).index_copy_(0, new, taken)
    return slots, misses, counts


def _freed(last_used: Tensor, now: Tensor, counts: Tensor) -> Tensor:
    """The slots that make room, as many as chunks are missing: bool [R, Hk, B]."""
    idle = last_used < now
    if torch.equal(idle.sum(-1, dtype=torch.int32), counts):  # as with the paper's policy
        return idle
    oldest = last_used.argsort(dim=-1, stable=True)  # slots hit in this step are the newest
    rank = torch.arange(last_used.shape[-1], device=last_used.device)
    return torch.zeros_like(idle).scatter_(2, oldest, rank < counts[..., None])


def _fake(
    ids: Tensor, step: Tensor, chunk_of_slot: Tensor, last_used: Tensor, slot_of_chunk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(ids), torch.empty_like(ids), ids.new_empty(ids.shape[:2])


define(
    "update_residency(Tensor ids, Tensor step, Tensor(a!) chunk_of_slot, Tensor(b!) last_used, "
    "Tensor(c!) slot_of_chunk) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)


def update_residency(
    ids: Tensor, step: Tensor, chunk_of_slot: Tensor, last_used: Tensor, slot_of_chunk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the selected chunks in a buffer of slots, and give the missing ones the oldest slots.

    Of k chunks that are missing, in their order, the j-th takes the j-th in order of the k least
    recently used slots; of slots that were last used in one step the lower ones are taken.

    With as many slots as chunks are selected, only the last step's selection is kept: the paper's
    policy. More slots make it a buffer of the least recently used.

    Args:
        ids: int32 [R, Hk, N], selected chunks, -1 where there is none.
        step: int32 [R], a number that grows from call to call.
        chunk_of_slot: int32 [R, Hk, B], the chunk in each slot or -1; changed in place.
        last_used: int32 [R, Hk, B], the step that last selected each slot, -1 for never; a row that
            may use fewer than B slots holds the largest int32 in the others. Changed in place.
        slot_of_chunk: int32 [R, Hk, C], the slot of each chunk or -1; changed in place.

    Returns:
        int32 [R, Hk, N] slot of each selected chunk (-1 where none is); int32 [R, Hk, N], the
        places in the selection of the chunks that have to be brought there, ascending, then -1; and
        int32 [R, Hk], how many these are.
    """
    return torch.ops.shadowkv.update_residency(ids, step, chunk_of_slot, last_used, slot_of_chunk)
