"""What every KV method is to the rest of the program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowkv_cli.config import MethodSpec, ModelShape
from shadowkv_cli.methods.store import Prompt, PromptStore


@dataclass(frozen=True)
class Row:
    """One row of a decoding batch: a method with its settings, on one prompt of the store."""

    spec: MethodSpec
    prompt_index: int


class Group(ABC):
    """The rows of one method and layout; its state is tensors, sized when it is built.

    The order of calls: per prompt `begin` and, for each layer, `prefill_layer`; per decoded token
    `step`, then for each layer `append` and `attend`. `reset` goes back to the end of the prefill.
    """

    def __init__(self, rows: Sequence[Row], store: PromptStore, new_tokens: int) -> None:
        self.rows = list(rows)
        self.store = store
        self.new_tokens = new_tokens
        self.shape: ModelShape = store.shape
        device = store.device
        self.prompt_index = torch.tensor(
            [row.prompt_index for row in rows], dtype=torch.int32, device=device
        )
        self.generated = torch.zeros(len(rows), dtype=torch.int32, device=device)
        self.steps = 0

    def rows_of(self, prompt_index: int) -> list[int]:
        """The group's rows that decode a prompt."""
        return [r for r, row in enumerate(self.rows) if row.prompt_index == prompt_index]

    def begin(self, prompt: Prompt) -> None:
        """Get ready for the prefill of a prompt; forgets what was decoded before."""
        room = self.store.prompt_tokens
        assert prompt.tokens <= room, f"a prompt of {prompt.tokens} tokens, room for {room}"
        self.reset()

    @abstractmethod
    def prefill_layer(self, layer: int, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take in a prompt's layer: q [Hq, S, D], k and v [Hk, S, D], all after RoPE.

        The store has taken in k and v already.
        """

    def step(self) -> None:
        """Make room for one more token in every row."""
        assert self.steps < self.new_tokens, f"room for {self.new_tokens} generated tokens is used"
        self.steps += 1
        self.generated += 1

    @abstractmethod
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add each row's new token: k and v [R, Hk, D], after RoPE."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attend from each row's new token: q [R, Hq, D] to [R, Hq, D]."""

    def reset(self) -> None:
        """Forget what was decoded."""
        self.steps = 0
        self.generated.zero_()

    @abstractmethod
    def audit(self, row: int, generated_tokens: int) -> dict[str, Any]:
        """What the row attended in its last step, in tokens, and its hit rate.

        Returns `attended_tokens, selected, outlier, local, generated`, and `hit_rate` (of steps
        after the first; None where nothing is fetched).
        """
