"""What every KV method is to the rest of the program."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from shadowkv_cli.config import MethodSpec, ModelShape
from shadowkv_cli.methods.store import Prompt, PromptStore


@dataclass(frozen=True)
class Row:
    """One row of a decoding batch: a method with its settings, on one prompt of the store."""

    spec: MethodSpec
    prompt_index: int


Places = tuple[Tensor, Tensor, Tensor]
"""Row, token and place behind the prompt of each token of a step, int64 [M]."""


def as_index(places: Sequence[int], device: torch.device) -> slice | Tensor:
    """Places in a batch: a slice, which copies nothing, where they are neighbours."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(places, device=device)


class Group(ABC):
    """The rows of one method and layout; its state is tensors, sized when it is built.

    The order of calls: per prompt `begin` and, for each layer, `prefill_layer`; then per decoded
    token, or per turn of several tokens, `step`, and for each layer `append` and `attend`. `reset`
    goes back to the end of the prefill.

    Attributes:
        generated: int32 [R], tokens behind the prompt, those of the running step included.
        counts: int32 [R], tokens of the running step; rows may have unequal numbers of them.
        seen: int32 [R], what `generated` is for the token that attends.
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
        self.counts = torch.ones_like(self.generated)
        self.seen = self.generated
        self.row_index = torch.arange(len(rows), device=device)
        self.used = 0

    def subset(self, rows: Sequence[int]) -> Self:
        """A group of some of the rows that goes on from where they stand.

        For the rest of an answer: this group must not be stepped any more until its `reset`.
        """
        part = copy.copy(self)
        part.rows = [self.rows[row] for row in rows]
        index = as_index(rows, self.row_index.device)
        part.prompt_index = self.prompt_index[index]
        part.generated = self.generated[index]
        part.counts = self.counts[index]
        part.row_index = self.row_index[: len(rows)]
        part.take_rows(rows, index)
        part.see(part.generated)
        return part

    @abstractmethod
    def take_rows(self, rows: Sequence[int], index: slice | Tensor) -> None:
        """Keep of a method's own state what belongs to some of the rows, without changing it."""

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

    def step(self, counts: Tensor | None = None) -> None:
        """Make room for one more token in every row, or for `counts` of them: int32 [R]."""
        self.used += 1 if counts is None else int(counts.max())
        assert self.used <= self.new_tokens, f"room for {self.new_tokens} generated tokens is used"
        self.counts = torch.ones_like(self.generated) if counts is None else counts
        self.generated += self.counts
        self._places: dict[int, Places] = {}
        self.see(self.generated)

    def see(self, seen: Tensor) -> None:
        """Set how many generated tokens the attending token of each row sees: int32 [R]."""
        self.seen = seen

    def places(self, tokens: int) -> Places:
        """Where the tokens of the running step go, the same in every layer."""
        if tokens not in self._places:
            self._places[tokens] = self._find_places(tokens)
        return self._places[tokens]

    def _find_places(self, tokens: int) -> Places:
        if tokens == 1:
            return self.row_index, torch.zeros_like(self.row_index), (self.generated - 1).long()
        token = torch.arange(tokens, device=self.counts.device)
        row, token = (token < self.counts[:, None]).nonzero(as_tuple=True)
        return row, token, (self.generated - self.counts).long()[row] + token

    @abstractmethod
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add the running step's tokens: k and v [R, Hk, T, D], after RoPE, T the most of any row.

        What stands behind a row's own count is left out.
        """

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attend from each token of the running step: q [R, Hq, T, D] to [R, Hq, T, D].

        A token sees the prompt as the method has it, and all tokens up to itself. What stands
        behind a row's own count means nothing.
        """
        if q.shape[2] == 1:
            return self.attend_token(layer, q[:, :, 0], scale)[:, :, None]
        out = torch.empty_like(q)
        for token in range(q.shape[2]):
            self.see(self.generated - (self.counts - 1 - token).clamp_min(0))
            out[:, :, token] = self.attend_token(layer, q[:, :, token], scale)
        return out

    @abstractmethod
    def attend_token(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attend from one token of each row, which sees `seen` generated ones: q [R, Hq, D]."""

    def reset(self) -> None:
        """Forget what was decoded."""
        self.used = 0
        self.generated.zero_()
        self.counts = torch.ones_like(self.generated)
        self.seen = self.generated

    @abstractmethod
    def audit(self, row: int, generated_tokens: int) -> dict[str, Any]:
        """What the row attended in its last step, in tokens, and its hit rate.

        Returns `attended_tokens, selected, outlier, local, generated`, and `hit_rate` (of steps
        after the first; None where nothing is fetched).
        """
