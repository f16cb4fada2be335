"""Which selected chunks are at hand already, and where the others go."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops.library import check, define
from shadowkv_cli.ops.misses import list_misses


def _reference(
    ids: Tensor, step: Tensor, chunk_of_slot: Tensor, last_used: Tensor, slot_of_chunk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    slots_held, wanted = chunk_of_slot.shape[-1], ids.shape[-1]
    check(
        slots_held >= wanted,
        "update_residency",
        f"chunk_of_slot holds {slots_held} slots, fewer than the {wanted} chunks selected",
    )
    valid = ids >= 0
    index = ids.clamp_min(0).long()
    slots = slot_of_chunk.gather(2, index).masked_fill(~valid, -1)
    hits = (slots >= 0).nonzero(as_tuple=True)
    last_used[hits[0], hits[1], slots[hits].long()] = step[hits[0]]
    missing = valid & (slots < 0)
    misses, counts = list_misses(missing)
    if not bool(counts.any()):
        return slots, misses, counts
    # Slots hit in this step are the newest.
    oldest = last_used.argsort(dim=-1, stable=True)
    rank = torch.arange(slots_held, device=ids.device)
    kept = rank >= counts[..., None]
    free = oldest.masked_fill(kept, slots_held).sort(-1).values
    order = (missing.cumsum(-1) - 1).clamp_min(0)
    new = missing.nonzero(as_tuple=True)
    row, head = new[0], new[1]
    taken = free.gather(2, order)[new]
    evicted = chunk_of_slot[row, head, taken].long()
    held = evicted >= 0
    slot_of_chunk[row[held], head[held], evicted[held]] = -1
    slot_of_chunk[row, head, index[new]] = taken.to(torch.int32)
    chunk_of_slot[row, head, taken] = ids[new]
    last_used[row, head, taken] = step[row]
    slots[new] = taken.to(torch.int32)
    return slots, misses, counts


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
