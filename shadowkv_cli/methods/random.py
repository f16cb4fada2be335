"""Control: chunks drawn at random for every step, layer and KV head, with exact keys and values."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from shadowkv_cli.config import RandomSpec
from shadowkv_cli.methods.exact import ExactGroup
from shadowkv_cli.methods.store import Prompt
from shadowkv_cli.ops.select_chunks import top_chunks


class RandomGroup(ExactGroup):
    """Rows that draw chunks; a draw depends on seed, prompt, layer and step, and nothing else."""

    def begin(self, prompt: Prompt) -> None:
        self.prompt_keys = {**getattr(self, "prompt_keys", {}), prompt.index: prompt.key}
        super().begin(prompt)

    def select(self, layer: int, q: Tensor, scale: float) -> Tensor:
        heads = self.shape.num_kv_heads
        chunks = self.store.prompt_tokens // self.chunk_size
        scores = torch.full((len(self.rows), heads, chunks), float("-inf"))
        seen = self.seen.tolist()
        for r, row in enumerate(self.rows):
            assert isinstance(row.spec, RandomSpec)
            name = f"{row.spec.seed}:{self.prompt_keys[row.prompt_index]}:{layer}:{seen[r]}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
            generator = torch.Generator().manual_seed(seed)
            allowed = int(self.num_chunks[r])
            scores[r, :, :allowed] = torch.rand(heads, allowed, generator=generator)
        return top_chunks(scores.to(q.device), self.budget_chunks, self.max_chunks)
