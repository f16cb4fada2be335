"""Control: chunks drawn at random for every step, layer and KV head, with exact keys and values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from shadowkv_cli.config import RandomSpec
from shadowkv_cli.methods.base import Row
from shadowkv_cli.methods.exact import ExactGroup
from shadowkv_cli.methods.store import Prompt, PromptStore
from shadowkv_cli.ops.select_chunks import top_chunks

WORD = (1 << 64) - 1
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Odd constants of the mixer splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""


def _signed(word: int) -> int:
    """A 64-bit word as torch's int64 holds it."""
    return (word & WORD) - ((word & (1 << 63)) << 1)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros, which int64 by itself fills with its sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def mixed(words: Tensor) -> Tensor:
    """Scramble 64-bit words (the finaliser of splitmix64): the same on every device."""
    for bits, multiplier in ((30, MULTIPLIERS[1]), (27, MULTIPLIERS[2])):
        words = (words ^ _shifted(words, bits)) * _signed(multiplier)
    return words ^ _shifted(words, 31)


class RandomGroup(ExactGroup):
    """Rows that draw chunks; a draw depends on seed, prompt, layer, step and head, nothing else."""

    def __init__(self, rows: Sequence[Row], store: PromptStore, new_tokens: int) -> None:
        super().__init__(rows, store, new_tokens)
        self.seeds = torch.zeros(len(rows), dtype=torch.int64, device=store.device)
        heads = self.shape.num_kv_heads
        chunks = store.prompt_tokens // self.chunk_size
        head = torch.arange(heads, device=store.device)[:, None] << 32
        chunk = torch.arange(chunks, device=store.device)
        self.offsets = (head + chunk) * _signed(MULTIPLIERS[0])  # [Hk, C]

    def take_rows(self, rows: Sequence[int], index: slice | Tensor) -> None:
        super().take_rows(rows, index)
        self.seeds = self.seeds[index]

    def begin(self, prompt: Prompt) -> None:
        for row in self.rows_of(prompt.index):
            spec = self.rows[row].spec
            assert isinstance(spec, RandomSpec)
            digest = hashlib.sha256(f"{spec.seed}:{prompt.key}".encode()).digest()
            self.seeds[row] = _signed(int.from_bytes(digest[:8], "big"))
        super().begin(prompt)

    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        step = self.seen.long() * self.shape.num_layers + layer
        words = mixed(mixed(self.seeds + step)[:, None, None] + self.offsets)
        scores = _shifted(words, 40).float()  # 24 bits, which float32 holds exactly
        chunk = torch.arange(self.offsets.shape[1], device=q.device)
        barred = (chunk >= self.num_chunks[:, None])[:, None]
        return top_chunks(
            scores.masked_fill(barred, float("-inf")), self.budget_chunks, self.max_chunks
        )
