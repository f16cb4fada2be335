"""What sparse methods share: one address space a row, slots for a step's chunks, counting."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.config import Kept, SparseSpec, StoredDtype, buffer_slots
from shadowkv_cli.methods.base import Group, Row
from shadowkv_cli.methods.side_stream import (
    FIRST,
    SECOND,
    Join,
    SideStream,
    after_failure,
    beside,
    wait_for,
)
from shadowkv_cli.methods.store import Prompt, PromptStore
from shadowkv_cli.methods.value_store import stored
from shadowkv_cli.ops.await_rows import Progress

NEVER_FREE = torch.iinfo(torch.int32).max


@dataclass
class Residency:
    """Slot tables of one buffer in one layer; see `ops.update_residency`."""

    chunk_of_slot: Tensor  # int32 [R, Hk, B]
    last_used: Tensor  # int32 [R, Hk, B]
    slot_of_chunk: Tensor  # int32 [R, Hk, C]

    @classmethod
    def empty(
        cls, rows: int, heads: int, slots: int, chunks: int, device: torch.device
    ) -> Residency:
        def table(size: int) -> Tensor:
            return torch.full((rows, heads, size), -1, dtype=torch.int32, device=device)

        return cls(table(slots), table(slots), table(chunks))

    def of_rows(self, index: slice | Tensor) -> Residency:
        return Residency(
            self.chunk_of_slot[index], self.last_used[index], self.slot_of_chunk[index]
        )

    def clear(self, slots: Tensor) -> None:
        """Empty the buffer; row r may use the first slots[r] of it."""
        for table in (self.chunk_of_slot, self.last_used, self.slot_of_chunk):
            table.fill_(-1)
        beyond = torch.arange(self.last_used.shape[-1], device=slots.device) >= slots[:, None]
        self.last_used.masked_fill_(beyond[:, None], NEVER_FREE)


class Placed(NamedTuple):
    """A layer's selected chunks, their slots, and which are not there yet."""

    ids: Tensor  # int32 [R, Hk, N]
    slots: Tensor  # int32 [R, Hk, N]
    misses: Tensor  # int32 [R, Hk, N], places in `ids`
    miss_counts: Tensor  # int32 [R, Hk]


class SparseGroup(Group):
    """Rows that attend `[outliers | local | generated | selected chunks]` of their prompt.

    A subclass says which chunks a step selects (`select`), how their keys come to the buffer
    (`load_keys`), and which tokens are outliers (`outlier_tokens`).
    """

    def __init__(self, rows: Sequence[Row], store: PromptStore, new_tokens: int) -> None:
        super().__init__(rows, store, new_tokens)
        self.specs: list[SparseSpec] = [_sparse(row.spec) for row in rows]
        self.chunk_size = self.specs[0].chunk_size
        device, heads, dim = store.device, self.shape.num_kv_heads, self.shape.head_dim
        kept = [self.kept(spec, store.prompt_tokens) for spec in self.specs]
        # A shorter prompt may have a longer remainder after its last whole chunk.
        outlier, local = (
            max(getattr(k, name) for k in kept) + self.chunk_size - 1
            for name in ("outlier_tokens", "local_tokens")
        )
        self.capacities = [outlier, local, new_tokens]
        self.fixed = sum(self.capacities)
        self.max_chunks = max(k.selected_chunks for k in kept)
        slots = [self.slots(s, k) for s, k in zip(self.specs, kept, strict=True)]
        key_slots, value_slots = (max(s[i] for s in slots) for i in (0, 1))
        self.one_table = all(k == v for k, v in slots)
        count, chunks = len(rows), store.prompt_tokens // self.chunk_size
        layers = range(self.shape.num_layers)

        def zeros(*size: int, dtype: torch.dtype = store.dtype) -> list[Tensor]:
            return [torch.zeros(count, heads, *size, dtype=dtype, device=device) for _ in layers]

        tokens = [self.fixed + slots * self.chunk_size for slots in (key_slots, value_slots)]
        self.value_buffers: list[Tensor] = []
        """Of values in fp8 [R, Hk, B, c, D], of packed ones [R, Hk, B, c, W]; none: the buffer lies
        behind the fixed part."""
        self.value_scales: list[Tensor] = []
        """Of what lies there in fp8: float32 [R, Hk, B]."""
        if self.value_dtype != "model":
            tokens[1] = self.fixed
            dtype, width = stored(self.value_dtype, store.dtype, dim)
            self.value_buffers = zeros(value_slots, self.chunk_size, width, dtype=dtype)
            if self.value_dtype == "fp8":
                self.value_scales = zeros(value_slots, dtype=torch.float32)
        self.keys, self.values = (zeros(places, dim) for places in tokens)
        self.key_tables = [Residency.empty(count, heads, key_slots, chunks, device) for _ in layers]
        self.value_tables = (
            self.key_tables
            if self.one_table
            else [Residency.empty(count, heads, value_slots, chunks, device) for _ in layers]
        )

        def per_row() -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.plane = self.row_index.to(torch.int32)  # a row's place in `keys` and `values`
        self.budget_chunks, self.num_chunks = per_row(), per_row()
        self.section_lengths = torch.zeros(count, 3, dtype=torch.int32, device=device)
        """Tokens in use of each fixed section: outliers, local, generated."""
        self.key_slot_counts, self.value_slot_counts = per_row(), per_row()
        self.row_kept: list[Kept] = kept
        self.fetched = torch.zeros(new_tokens + 1, count, dtype=torch.int64, device=device)
        self.selected = torch.zeros_like(self.fetched)  # by step and row
        self._placed: tuple[Placed, Placed]
        """Keys and values of the last layer: held until all lanes have joined."""
        self._to_count: list[tuple[Tensor, Tensor, Tensor]] = []
        self._counted: list[tuple[Tensor, Tensor, Tensor]] = []
        """What is being counted: held until that has joined."""
        self._counting = Join()
        self._outputs: list[Tensor] = []
        """Of the last layer's lanes: held until the next one, when others have waited for this."""
        self.stream: SideStream | None = None
        """Where a lane attends beside the others."""
        self.key_stream: SideStream | None = None
        """Where it rebuilds keys before, and places them, if they have a table of their own."""
        self.fetch_stream: SideStream | None = None
        """Where values are placed and fetched beside that; None: one after the other."""
        self.count_stream: SideStream | None = None
        """Where a step's chunks are counted beside the model's last layers; None: behind them."""
        self.progress: Progress | None = None
        """Of a selection whose lanes go on beside each other."""
        self._parts: list[SparseGroup] = []

    def take_rows(self, rows: Sequence[int], index: slice | Tensor) -> None:
        self.specs = [self.specs[row] for row in rows]
        self.row_kept = [self.row_kept[row] for row in rows]
        self.max_chunks = max(kept.selected_chunks for kept in self.row_kept)
        self.keys = [keys[index] for keys in self.keys]
        self.values = [values[index] for values in self.values]
        self.value_buffers = [buffer[index] for buffer in self.value_buffers]
        self.value_scales = [scales[index] for scales in self.value_scales]
        self.key_tables = [table.of_rows(index) for table in self.key_tables]
        self.value_tables = (
            self.key_tables
            if self.one_table
            else [table.of_rows(index) for table in self.value_tables]
        )
        self.plane = self.plane[: len(rows)]
        self.budget_chunks = self.budget_chunks[index]
        self.num_chunks = self.num_chunks[index]
        self.section_lengths = self.section_lengths[index]
        self.key_slot_counts = self.key_slot_counts[index]
        self.value_slot_counts = self.value_slot_counts[index]
        self.fetched = self.fetched[:, index].contiguous()
        self.selected = self.selected[:, index].contiguous()
        self._to_count, self._counted, self._counting = [], [], Join()
        self._outputs = []
        self._parts, self.progress = [], None

    def micro_batches(self, count: int) -> list[Self]:
        parts = super().micro_batches(count)
        if self.fetch_stream is not None:  # with one for all, each would wait for the others
            for part in parts:
                part.fetch_stream = SideStream(self.store.device)
        return parts

    def kept(self, spec: SparseSpec, prompt_tokens: int) -> Kept:
        """What the method attends of a prompt; selected, outlier and local tokens."""
        return spec.keeps(prompt_tokens)

    @property
    def value_dtype(self) -> StoredDtype:
        """What the buffer of values holds; other than the model's, it stands for itself."""
        return "model"

    def slots(self, spec: SparseSpec, kept: Kept) -> tuple[int, int]:
        """Slots of the key and value buffers."""
        count = buffer_slots(kept.selected_chunks, 1.0)
        return count, count

    @abstractmethod
    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Choose this step's chunks: int32 [R, Hk, N] ascending, then -1."""

    @abstractmethod
    def load_keys(self, layer: int, placed: Placed) -> None:
        """Bring the keys of missing chunks into the key buffer."""

    @abstractmethod
    def load_values(self, layer: int, placed: Placed) -> None:
        """Bring the values of missing chunks into the value buffer."""

    @abstractmethod
    def outlier_tokens(self, layer: int, row: int, prompt: Prompt, k: Tensor) -> Tensor:
        """Token ids [Hk, n] of the outliers of a row, ascending, n as `kept` says."""

    def begin(self, prompt: Prompt) -> None:
        for row in self.rows_of(prompt.index):
            kept = self.kept(self.specs[row], prompt.tokens)
            self.row_kept[row] = kept
            key_slots, value_slots = self.slots(self.specs[row], kept)
            self.budget_chunks[row] = kept.selected_chunks
            self.num_chunks[row] = (prompt.tokens - kept.local_tokens) // self.chunk_size
            self.section_lengths[row, 0] = kept.outlier_tokens
            self.section_lengths[row, 1] = kept.local_tokens
            self.key_slot_counts[row] = key_slots
            self.value_slot_counts[row] = value_slots
        super().begin(prompt)

    def prefill_layer(self, layer: int, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> None:
        for row in self.rows_of(prompt.index):
            kept = self.row_kept[row]
            tokens = self.outlier_tokens(layer, row, prompt, k)
            index = tokens[..., None].expand(-1, -1, k.shape[-1])
            start = self.capacities[0]
            for space, source in ((self.keys[layer], k), (self.values[layer], v)):
                space[row, :, : tokens.shape[1]] = source.gather(1, index)
                local = source[:, prompt.tokens - kept.local_tokens :]
                space[row, :, start : start + kept.local_tokens] = local

    def first_place(self) -> int:
        return self.capacities[0] + self.capacities[1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        if k.shape[2] == 1:
            place, space = self.next_place(), (self.keys[layer], self.values[layer])
            ops.append_tokens(k[:, :, 0], v[:, :, 0], self.plane, place, *space)
            return
        row, token, place = self.places(k.shape[2])
        where = (row, slice(None), self.first_place() + place)
        self.keys[layer][where] = k[row, :, token]
        self.values[layer][where] = v[row, :, token]

    def buffer(self, space: Tensor) -> Tensor:
        """The slots behind the fixed part of an address space: [R, Hk, B, c, D]."""
        return space[:, :, self.fixed :].unflatten(2, (-1, self.chunk_size))

    def attend_token(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attend lane by lane: while one lane waits for its values, the next ones select.

        One kernel selects for all lanes. Each goes on, beside the others, when its own rows are
        done.
        """
        if not self.max_chunks:
            none = self.seen.new_empty(len(self.rows), self.shape.num_kv_heads, 0)
            return self._attend_slots(layer, q, none, none, scale)
        ids = self.select(layer, q if self.drift is None else self.drift.queries(layer), scale)
        if self.turn is not None:
            self.turn.mark()
        sizes = [len(lane.rows) for lane in self.lanes]
        begun: list[Join] = []
        outputs, joins, first = [], [], 0
        with after_failure(lambda: wait_for(begun)):
            for lane, own, part in zip(self.lanes, ids.split(sizes), q.split(sizes), strict=True):
                rows = slice(first, first + len(lane.rows))
                out, there = self._attend_lane(lane, rows, layer, own, part, scale, begun)
                outputs.append(out)
                joins.append(there)
                first = rows.stop
        wait_for(joins)
        for lane, counter in zip(self.lanes, self._counter.split(sizes), strict=True):
            values = lane._placed[1]
            self._to_count.append((counter, values.ids, values.miss_counts))
        if layer == self.shape.num_layers - 1:
            with beside(self.count_stream) as self._counting:
                self._count()
        # A lane of another micro-batch may have the same stream (torch has 32), and take the memory
        # while this one's stream still reads it.
        self._outputs = outputs
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_lane(
        self,
        lane: SparseGroup,
        rows: slice,
        layer: int,
        ids: Tensor,
        q: Tensor,
        scale: float,
        begun: list[Join],
    ) -> tuple[Tensor, Join]:
        """Place, fetch, rebuild and attend a lane's chunks, on its own streams where it has some.

        Args:
            lane: some rows of this group, or itself.
            rows: those.
            layer, q, scale: as in `attend_token`, q of these rows.
            ids: int32 [R, Hk, N], selected for them.
            begun: what is issued beside is added here.

        Returns:
            [R, Hq, D], and its join, behind which all else of the lane is done.
        """
        selecting = None if self.progress is None else self.progress.begun
        placed = Join()
        with beside(lane.fetch_stream, selecting) as fetched:
            begun.append(fetched)
            if self.progress is not None:
                self.progress.wait(rows, self.shape.num_kv_heads)
            values = lane._place(lane.value_tables[layer], ids)
            if lane.fetch_stream is not None:
                placed.mark()
            lane.load_values(layer, values)
        with beside(lane.key_stream, selecting) as rebuilt:
            begun.append(rebuilt)
            placed.wait()
            keys = values if lane.one_table else lane._place(lane.key_tables[layer], ids)
            lane.load_keys(layer, keys)
        with beside(lane.stream, selecting) as there:
            begun.append(there)
            rebuilt.wait()
            fetched.wait()
            out = lane._attend_slots(layer, q, keys.slots, values.slots, scale)
        # A stream's memory could go to another lane, where two have one stream: torch has 32.
        lane._placed = keys, values
        return out, there

    def _attend_slots(
        self, layer: int, q: Tensor, key_slots: Tensor, value_slots: Tensor, scale: float
    ) -> Tensor:
        out, _ = ops.sparse_attention(
            q,
            self.keys[layer],
            self.values[layer],
            key_slots,
            value_slots,
            self.section_lengths,
            self.capacities,
            self.chunk_size,
            scale,
            self.value_buffers[layer] if self.value_buffers else None,
            self.value_scales[layer] if self.value_scales else None,
        )
        return out

    def _place(self, table: Residency, ids: Tensor) -> Placed:
        found = ops.update_residency(
            ids, self.seen, table.chunk_of_slot, table.last_used, table.slot_of_chunk
        )
        return Placed(ids, *found)

    def split_lanes(self, count: int) -> None:
        rows = range(len(self.rows))
        self._parts, self.progress = [], None
        if count == 1:
            return
        # The first lane is the one that may be smaller: with it the bus begins to work.
        size = math.ceil(len(rows) / count)
        ends = range(len(rows), 0, -size)[::-1]
        self._parts = [self.subset(rows[max(end - size, 0) : end]) for end in ends]
        if self.fetch_stream is None:
            return
        # What keeps the bus busy goes first, then what attention waits for, and the selection last.
        device = self.store.device
        self.progress = Progress(len(rows), device)
        for lane in self._parts:
            lane.stream = SideStream(device)
            lane.key_stream = SideStream(device, SECOND)
            lane.fetch_stream = SideStream(device, FIRST)

    @property
    def lanes(self) -> Sequence[SparseGroup]:
        return self._parts or [self]

    def advance(self, counts: Tensor | None = None) -> None:
        super().advance(counts)
        if self.drift is not None:
            self.drift.advance()

    def see(self, seen: Tensor) -> None:
        super().see(seen)
        self.section_lengths[:, 2] = seen
        self._counter = seen.long() * self.fetched.shape[1] + self.row_index
        if self._parts:
            own = seen.split([len(lane.rows) for lane in self._parts])
            for lane, part in zip(self._parts, own, strict=True):
                lane.seen = part

    def finish(self) -> None:
        super().finish()
        if self.drift is not None:
            self.drift.join()
        self._counting.wait()
        self._outputs, self._counted = [], []

    def _count(self) -> None:
        """Count what the step selected and fetched; one sum over all layers."""
        counters, ids, misses = (torch.cat(parts) for parts in zip(*self._to_count, strict=True))
        self.selected.view(-1).index_add_(0, counters, (ids >= 0).sum((1, 2)))
        self.fetched.view(-1).index_add_(0, counters, misses.sum(1))
        self._counted += self._to_count
        self._to_count = []

    def reset(self) -> None:
        super().reset()
        self._to_count, self._counted, self._counting = [], [], Join()
        self.fetched.zero_()
        self.selected.zero_()
        if self.progress is not None:
            self.progress.done.zero_()
        for table in self.key_tables:
            table.clear(self.key_slot_counts)
        if not self.one_table:
            for table in self.value_tables:
                table.clear(self.value_slot_counts)

    def chunk_counts(self, first_step: int, last_step: int) -> tuple[int, int]:
        steps = slice(first_step, last_step + 1)
        return int(self.selected[steps].sum()), int(self.fetched[steps].sum())

    def audit(self, row: int, generated_tokens: int) -> dict[str, Any]:
        kept, own = self.row_kept[row], (slice(2, generated_tokens + 1), row)
        fetched, selected = int(self.fetched[own].sum()), int(self.selected[own].sum())
        return {
            "attended_tokens": kept.tokens + generated_tokens,
            "selected": kept.selected_tokens,
            "outlier": kept.outlier_tokens,
            "local": kept.local_tokens,
            "generated": generated_tokens,
            "hit_rate": 1 - fetched / selected if selected else None,
        }


def _sparse(spec: object) -> SparseSpec:
    assert isinstance(spec, SparseSpec), f"{spec} is no sparse method"
    return spec
