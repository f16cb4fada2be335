"""Control: the chunks that truly hold the most attention, with exact keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.methods.base import Row
from shadowkv_cli.methods.exact import ExactGroup
from shadowkv_cli.methods.store import PromptStore


class OracleGroup(ExactGroup):
    """Rows of a perfect selector: every key is a landmark of its chunk."""

    def __init__(self, rows: Sequence[Row], store: PromptStore, new_tokens: int) -> None:
        super().__init__(rows, store, new_tokens)
        shape = (len(rows), self.shape.num_kv_heads, store.prompt_tokens // self.chunk_size)
        self.excluded = torch.zeros(shape, dtype=torch.bool, device=store.device)

    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        return ops.select_chunks(
            q,
            self.store.chunked(self.store.keys[layer], self.chunk_size),
            self.prompt_index,
            self.num_chunks,
            self.excluded,
            self.budget_chunks,
            self.max_chunks,
            scale,
        )
