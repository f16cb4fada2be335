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

    def first_place(self) -> Tensor:
        return self.prompt_lengths

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self.store.keys[layer], self.store.values[layer]
        if k.shape[2] == 1:
            place = self.next_place()
            ops.append_tokens(k[:, :, 0], v[:, :, 0], self.prompt_index, place, keys, values)
            return
        row, token, place = self.places(k.shape[2])
        where = (self.prompt_index.long()[row], slice(None), self.prompt_lengths[row] + place)
        keys[where] = k[row, :, token]
        values[where] = v[row, :, token]

    def see(self, seen: Tensor) -> None:
        super().see(seen)
        self.attended = self.prompt_lengths + seen

    def attend_token(self, layer: int, q: Tensor, scale: float) -> Tensor:
        return ops.full_attention(
            q,
            self.store.keys[layer],
            self.store.values[layer],
            self.prompt_index,
            self.attended,
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
