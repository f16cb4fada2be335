"""Sparse methods whose selected chunks keep their exact keys: the ground of the controls."""

from __future__ import annotations

from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.config import Kept, SparseSpec
from shadowkv_cli.methods.sparse import Placed, SparseGroup
from shadowkv_cli.methods.store import Prompt


class ExactGroup(SparseGroup):
    """Rows that select as many chunks as ShadowKV selects and keeps as outliers, in one."""

    def kept(self, spec: SparseSpec, prompt_tokens: int) -> Kept:
        kept = spec.keeps(prompt_tokens)
        chunks = kept.selected_chunks + kept.outlier_chunks
        return Kept(chunks, 0, kept.local_tokens, kept.chunk_size)

    def outlier_tokens(self, layer: int, row: int, prompt: Prompt, k: Tensor) -> Tensor:
        return self.prompt_index.new_empty(k.shape[0], 0).long()

    def load_keys(self, layer: int, placed: Placed) -> None:
        self._load(self.store.keys[layer], self.keys[layer], placed)

    def load_values(self, layer: int, placed: Placed) -> None:
        self._load(self.store.values[layer], self.values[layer], placed)

    def _load(self, source: Tensor, space: Tensor, placed: Placed) -> None:
        chunks = self.store.chunked(source, self.chunk_size)
        ops.fetch_values(chunks, None, self.prompt_index, *placed, self.buffer(space))
