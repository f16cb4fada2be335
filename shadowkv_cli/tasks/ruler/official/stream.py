"""RULER's random numbers: one stream for a whole file, and throw-away ones for orderings."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import overload

import numpy as np

from shadowkv_cli.tasks.ruler.words import random_value, word_list


class Stream:
    """What RULER seeds when a generator starts; every draw moves it on, those of the search too.

    Attributes:
        random: Python's generator.
        numbers: numpy's, which draws the values of variables.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.RandomState(seed)

    def value(self, kind: str) -> str:
        """A key or value: `numbers`, `uuids` or `words`."""
        if kind == "words":
            return self.random.choice(all_keys())
        return random_value(kind, self.random)


class CompoundList(Sequence[str]):
    """The sorted, distinct `first-second` strings of two word lists, of which none is stored.

    RULER builds all six million of them. In sorted order the strings of one first word follow each
    other, except where a first word continues another behind its hyphen: those are sorted together.
    """

    def __init__(self, firsts: Sequence[str], seconds: Sequence[str]) -> None:
        self._seconds = sorted(set(seconds))
        blocks: list[tuple[str, list[str]]] = []  # beginning of all, and the rests
        heads = sorted({f"{first}-" for first in firsts})
        start = 0
        while start < len(heads):
            head, end = heads[start], start + 1
            while end < len(heads) and heads[end].startswith(head):
                end += 1
            rests = self._seconds
            if end > start + 1:
                tails = [other.removeprefix(head) for other in heads[start:end]]
                rests = sorted({tail + second for tail in tails for second in self._seconds})
            blocks.append((head, rests))
            start = end
        self._blocks = blocks
        self._ends = list(accumulate(len(rests) for _, rests in blocks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} compounds, no number {index}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        head, rests = self._blocks[number]
        return head + rests[index - (self._ends[number - 1] if number else 0)]


@cache
def all_keys() -> CompoundList:
    """All `adjective-noun` keys."""
    return CompoundList(word_list("adjectivelist"), word_list("nounlist"))
