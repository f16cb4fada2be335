"""ShadowKV: landmarks select, values are fetched, keys are rebuilt (paper, Algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.config import Kept, ShadowKVSpec, SparseSpec, StoredDtype
from shadowkv_cli.methods.base import Row
from shadowkv_cli.methods.side_stream import SideStream
from shadowkv_cli.methods.sparse import Placed, SparseGroup
from shadowkv_cli.methods.store import Prompt, PromptStore, empty_in_words


class ShadowKVGroup(SparseGroup):
    """Rows of ShadowKV whose landmarks and values are kept in one form each."""

    def __init__(self, rows: Sequence[Row], store: PromptStore, new_tokens: int) -> None:
        super().__init__(rows, store, new_tokens)
        first = self.specs[0]
        assert isinstance(first, ShadowKVSpec)
        self.landmark_form = (
            self.chunk_size,
            first.landmarks_per_chunk,
            first.landmark_dtype,
        )
        self.value_forms = first.value_forms(self.shape.num_layers)
        if first.value_placement == "host" and store.device.type == "cuda":
            self.fetch_stream = SideStream(store.device)
            self.count_stream = SideStream(store.device)
        self.fetch_turns = torch.zeros(2, dtype=torch.int32, device=store.device)
        """Which all lanes and micro-batches take, so that the first of them is served first."""
        ranks = [spec.rank for spec in self.specs if isinstance(spec, ShadowKVSpec)]
        self.max_rank = max(ranks)
        self.rank = torch.tensor(ranks, dtype=torch.int32, device=store.device)
        shape = (len(rows), self.shape.num_kv_heads, store.prompt_tokens // self.chunk_size)
        self.excluded = [
            empty_in_words(*shape, dtype=torch.bool, device=store.device).zero_()
            for _ in range(self.shape.num_layers)
        ]

    def take_rows(self, rows: Sequence[int], index: slice | Tensor) -> None:
        super().take_rows(rows, index)
        self.rank = self.rank[index]
        self.excluded = [excluded[index] for excluded in self.excluded]

    @property
    def value_dtype(self) -> StoredDtype:
        first = self.specs[0]
        assert isinstance(first, ShadowKVSpec)
        return first.value_dtype

    def slots(self, spec: SparseSpec, kept: Kept) -> tuple[int, int]:
        assert isinstance(spec, ShadowKVSpec)
        return spec.slots(kept)

    def outlier_tokens(self, layer: int, row: int, prompt: Prompt, k: Tensor) -> Tensor:
        # Not from `num_chunks`, which would wait for the device.
        chunks = (prompt.tokens - self.row_kept[row].local_tokens) // self.chunk_size
        similarity = self.store.similarity[self.chunk_size][:, :chunks]
        worst = similarity.topk(self.row_kept[row].outlier_chunks, largest=False).indices
        excluded = self.excluded[layer][row]
        excluded.zero_()
        excluded.scatter_(1, worst, True)
        members = torch.arange(self.chunk_size, device=k.device)
        return (worst.sort().values[..., None] * self.chunk_size + members).flatten(1)

    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        scales, progress = self.store.landmark_scales.get(self.landmark_form), self.progress
        return ops.select_chunks(
            q,
            self.store.landmarks[self.landmark_form][layer],
            scales[layer] if scales else None,
            self.prompt_index,
            self.num_chunks,
            self.excluded[layer],
            self.budget_chunks,
            self.max_chunks,
            scale,
            None if progress is None else progress.done,
            None if progress is None else progress.begun,
        )

    def load_values(self, layer: int, placed: Placed) -> None:
        ops.fetch_values(
            *self.store.value_store.chunked(layer, self.chunk_size, self.value_forms[layer]),
            self.prompt_index,
            *placed,
            self.value_buffers[layer] if self.value_buffers else self.buffer(self.values[layer]),
            self.value_scales[layer] if self.value_scales else None,
            self.fetch_turns,
        )

    def load_keys(self, layer: int, placed: Placed) -> None:
        tables = self.store.tables
        assert tables is not None, "rotary tables come before the first step"
        cos, sin = tables.halves()
        ops.rebuild_keys(
            self.store.coefficients[layer][..., : self.max_rank],
            self.store.basis[layer][:, :, : self.max_rank],
            self.prompt_index,
            self.rank,
            *placed,
            cos,
            sin,
            tables.index,
            tables.interleaved,
            self.buffer(self.keys[layer]),
        )
