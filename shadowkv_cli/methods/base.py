"""What every KV method is to the rest of the program."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from shadowkv_cli.config import MethodSpec, ModelShape
from shadowkv_cli.methods.drift import DriftingRows
from shadowkv_cli.methods.side_stream import Join
from shadowkv_cli.methods.store import Prompt, PromptStore
from shadowkv_cli.ops import compiled


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
    token, or per turn of several tokens, `make_room`, `advance`, for each layer `append` and
    `attend`, and `finish`. `reset` goes back to the end of the prefill. From `advance` to `finish`
    a step of one token never waits for the device where `is_capturable`, so that a CUDA graph can
    hold it; `make_room` is then called by itself before each replay.

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
        self.drift: DriftingRows | None = None
        """Queries that select in place of the model's: benchmarks set them."""
        self.turn: Join | None = None
        """Marked in each layer when its chunks are selected: another micro-batch waits for that."""

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

    def micro_batches(self, count: int) -> list[Self]:
        """At most so many groups of neighbouring rows, to be decoded beside each other.

        This group must not be stepped meanwhile, and is reset with them.
        """
        rows = range(len(self.rows))
        size = math.ceil(len(rows) / count)
        return [self.subset(rows[first : first + size]) for first in rows[::size]]

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

    needs_queries: ClassVar[bool] = False
    """Whether `prefill_layer` reads q, which is written over as soon as the prompt has attended."""

    @abstractmethod
    def prefill_layer(self, layer: int, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take in a prompt's layer: q [Hq, T, D], k and v [Hk, S, D], all after RoPE.

        Queries are there of the last T tokens, which are all S where `needs_queries`.
        The store has taken in k and v already. On a GPU it runs beside the model and must never
        wait for the device.
        """

    @property
    def is_capturable(self) -> bool:
        """Whether the compiled ops make a step of one token free of waiting for the device."""
        shape = self.shape
        group = shape.num_q_heads // shape.num_kv_heads
        return self.store.device.type == "cuda" and compiled.ready(
            self.store.dtype, shape.head_dim, group
        )

    def make_room(self, tokens: int) -> None:
        """Take note that every row gets at most so many more tokens."""
        self.used += tokens
        assert self.used <= self.new_tokens, f"room for {self.new_tokens} generated tokens is used"

    def advance(self, counts: Tensor | None = None) -> None:
        """Begin a step of one more token in every row, or of `counts` of them: int32 [R]."""
        self.counts = torch.ones_like(self.generated) if counts is None else counts
        self.generated += self.counts
        self._places: dict[int, Places] = {}
        self._next_place: Tensor | None = None
        self.see(self.generated)

    def finish(self) -> None:
        """End a step, when all layers have attended."""
        self._places, self._next_place = {}, None

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
    def first_place(self) -> Tensor | int:
        """Where in the space of a row its first generated token lies: int32 [R], or one for all."""

    def next_place(self) -> Tensor:
        """Where the one token of the running step goes: int32 [R], the same in every layer."""
        if self._next_place is None:
            self._next_place = self.first_place() + (self.generated - 1)
        return self._next_place

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

    def split_lanes(self, count: int) -> None:
        """Work on the rows in so many parts, whose fetches overlap with each other's work."""
        assert count == 1, "nothing that this method does overlaps"

    def chunk_counts(self, first_step: int, last_step: int) -> tuple[int, int]:
        """Chunks that were selected, and those of them that were fetched, over all rows and layers.

        Steps are counted from 1; the first finds nothing.
        """
        return 0, 0

    def hit_rate(self, first_step: int, last_step: int) -> float | None:
        """Share of the selected chunks that were at hand; None where nothing is selected."""
        selected, fetched = self.chunk_counts(first_step, last_step)
        return 1 - fetched / selected if selected else None

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
