"""Full attention: every token of the prompt and of the answer, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.methods.base import Group, Row
from shadowkv_cli.methods.store import Prompt, PromptStore


class FullGroup(Group):
    """Rows of full attention; the store's keys and values are theirs to append to."""

    def __init__(self, rows: Sequence[Row], store: PromptStore, new_tokens: int) -> None:
        super().__init__(rows, store, new_tokens)
        prompts = [row.prompt_index for row in rows]
        assert len(set(prompts)) == len(prompts), "one row of full attention a prompt"
        self.prompt_lengths = torch.zeros_like(self.generated)

    def take_rows(self, rows: Sequence[int], index: slice | Tensor) -> None:
        self.prompt_lengths = self.prompt_lengths[index]

    def begin(self, prompt: Prompt) -> None:
        for row in self.rows_of(prompt.index):
            self.prompt_lengths[row] = prompt.tokens
        super().begin(prompt)

    def prefill_layer(self, layer: int, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Nothing to add: the store holds what full attention reads."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        row, token, place = self.places(k.shape[2])
        where = (self.prompt_index.long()[row], slice(None), self.prompt_lengths[row] + place)
        self.store.keys[layer][where] = k[row, :, token]
        self.store.values[layer][where] = v[row, :, token]

    def attend_token(self, layer: int, q: Tensor, scale: float) -> Tensor:
        return ops.full_attention(
            q,
            self.store.keys[layer],
            self.store.values[layer],
            self.prompt_index,
            self.prompt_lengths + self.seen,
            scale,
        )

    def audit(self, row: int, generated_tokens: int) -> dict[str, Any]:
        prompt = int(self.prompt_lengths[row])
        return {
            "attended_tokens": prompt + generated_tokens,
            "selected": prompt,
            "outlier": 0,
            "local": 0,
            "generated": generated_tokens,
            "hit_rate": None,
        }
