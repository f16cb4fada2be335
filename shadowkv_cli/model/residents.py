"""The prompts whose keys and values a store holds, and the longest beginning a new one shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shadowkv_cli.config import LEAST_SHARED_TOKENS

Frequencies = tuple[float, ...]
"""Numbers of a rotary table that are equal only where tables are."""


@dataclass(frozen=True)
class Prefix:
    """A beginning that is taken over: where its prompt lies in the store, and its tokens."""

    index: int
    tokens: int


class Residents:
    """Token ids of the prompts that lie whole in a store, by their place there."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Frequencies]] = {}

    def note(self, index: int, ids: Tensor, frequencies: Frequencies) -> None:
        """A prompt, int64 [S] on the host, was taken in, its keys rotated by these frequencies."""
        self._held[index] = ids, frequencies

    def forget(self, index: int) -> None:
        """Another prompt is about to be written there."""
        self._held.pop(index, None)

    def longest_prefix(self, ids: Tensor, frequencies: Frequencies) -> Prefix | None:
        """Where the longest beginning of a prompt lies, int64 [S] on the host; None if it is short.

        At least one token is left, whose logits are wanted. Keys that were rotated by other
        frequencies are of no use, and in families like longrope a prompt's length chooses them.
        """
        found = [
            Prefix(index, min(shared_tokens(ids, held), len(ids) - 1))
            for index, (held, rotated_by) in self._held.items()
            if rotated_by == frequencies
        ]
        best = max(found, key=lambda prefix: prefix.tokens, default=None)
        return best if best is not None and best.tokens >= LEAST_SHARED_TOKENS else None


def shared_tokens(one: Tensor, other: Tensor) -> int:
    """Tokens that two prompts, int64 [S] on the host, have in common before they first differ."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter
