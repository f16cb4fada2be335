"""A row that grows: ids, and which of them are answers."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from shadowkv_cli.train_demo.pieces import Pieces


@dataclass(frozen=True)
class Answer:
    """Ids `start` to `end` of a row are an answer; those in `lookups` can't be guessed from it."""

    start: int
    end: int
    lookups: tuple[int, ...]


@dataclass
class Row:
    """One training prompt with its answers.

    Attributes:
        task: the task's name, for the score.
        ids: with BOS in front; an answer's ids are part of it.
        answers: what is learned.
    """

    task: str
    ids: array[int] = field(default_factory=lambda: array("H"))
    answers: list[Answer] = field(default_factory=list)

    def add(self, *parts: Iterable[int]) -> None:
        for part in parts:
            self.ids.extend(part)

    def answer(self, parts: Iterable[tuple[Iterable[int], int]]) -> None:
        """Append an answer: parts of ids with how many of each, from its first, are looked up."""
        start = len(self.ids)
        lookups: list[int] = []
        for ids, count in parts:
            begin = len(self.ids)
            self.ids.extend(ids)
            lookups += range(begin, min(begin + count, len(self.ids)))
        self.answers.append(Answer(start, len(self.ids), tuple(lookups)))

    def end(self, eos: int) -> None:
        """Close the last answer with the end of the text, which is learned too."""
        self.ids.append(eos)
        last = self.answers[-1]
        self.answers[-1] = Answer(last.start, len(self.ids), last.lookups)

    def join(self, other: Row) -> None:
        """Append another row's ids and answers."""
        shift = len(self.ids)
        self.ids.extend(other.ids)
        for answer in other.answers:
            lookups = tuple(i + shift for i in answer.lookups)
            self.answers.append(Answer(answer.start + shift, answer.end + shift, lookups))


@dataclass(frozen=True)
class Request:
    """What a row should be like.

    Attributes:
        task: a RULER task, or `pairs`, or `repeats`.
        length: ids at most.
        exact: as RULER asks: one question about that task's own needles. Otherwise many questions
            about many needles, which teaches more per token.
        gap: for `pairs`: tokens between a key and its value at most.
    """

    task: str
    length: int
    exact: bool = True
    gap: int = 6


@dataclass
class Desk:
    """What rows are drawn with."""

    pieces: Pieces
    rng: random.Random


LOOKUPS = 3
"""Ids of a value, from its first, that are looked up: a space, and what tells it from others."""
