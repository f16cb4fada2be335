"""Control: attention sinks and the most recent tokens (StreamingLLM, ICLR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.config import Kept, SparseSpec, StreamingSpec
from shadowkv_cli.methods.sparse import Placed, SparseGroup
from shadowkv_cli.methods.store import Prompt


class StreamingGroup(SparseGroup):
    """Rows that attend the first tokens and as many recent ones as the budget leaves."""

    def kept(self, spec: SparseSpec, prompt_tokens: int) -> Kept:
        assert isinstance(spec, StreamingSpec)
        total = min(spec.keeps(prompt_tokens).tokens, prompt_tokens)
        sinks = min(spec.sink_tokens, total)
        return Kept(0, sinks, total - sinks, 1)

    def outlier_tokens(self, layer: int, row: int, prompt: Prompt, k: Tensor) -> Tensor:
        sinks = torch.arange(self.row_kept[row].outlier_tokens, device=k.device)
        return sinks.expand(k.shape[0], -1)

    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        raise AssertionError("streaming selects nothing")

    def load_keys(self, layer: int, placed: Placed) -> None:
        raise AssertionError("streaming loads nothing")

    def load_values(self, layer: int, placed: Placed) -> None:
        raise AssertionError("streaming loads nothing")
