"""Batches of rows as arrays; a batch depends on its job only, so any process can make it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shadowkv_cli.train_demo.chains import chain_row
from shadowkv_cli.train_demo.curriculum import EXACT_LENGTHS, NEEDLES, PAIRS, REPEATS
from shadowkv_cli.train_demo.drawing import Desk, Request, Row
from shadowkv_cli.train_demo.lists import common_words_row, frequent_words_row
from shadowkv_cli.train_demo.needles import needle_row, pair_row
from shadowkv_cli.train_demo.pieces import Pieces
from shadowkv_cli.train_demo.questions import question_row
from shadowkv_cli.train_demo.repeats import repeat_row

LOOKUP_WEIGHT = 4.0
"""Weight of an id that must be looked up; one that follows from those before it has 1."""

ATTEMPTS = 20
"""Draws until one fits, where a row is barely long enough for its task."""

MAKERS: dict[str, Callable[[Desk, Request], Row]] = {
    REPEATS: repeat_row,
    PAIRS: pair_row,
    **dict.fromkeys(NEEDLES, needle_row),
    "vt": chain_row,
    "cwe": common_words_row,
    "fwe": frequent_words_row,
    "qa_1": question_row,
    "qa_2": question_row,
}


@dataclass(frozen=True)
class Job:
    """One batch that is to be made.

    Attributes:
        seed, step: what the rows are drawn from.
        rows, length: the batch's shape.
        weights: names of what the rows can be, with their weights.
        exact: share of the rows that ask as RULER does.
        gap: for pairs.
    """

    seed: int
    step: int
    rows: int
    length: int
    weights: tuple[tuple[str, float], ...]
    exact: float
    gap: int


@dataclass(frozen=True)
class Batch:
    """Rows and what is learned from them.

    Attributes:
        ids: (rows, length), padded at the end.
        targets: (n,) flat indices into `ids` of the answers' ids.
        weights: (n,) of their losses; every row has the sum 1 / rows.
        groups: (n,) the answer that each belongs to.
        group_tasks: (groups,) names of the answers' tasks.
        length: ids of a row.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    groups: NDArray[np.int64]
    group_tasks: list[str]

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])


def make_row(pieces: Pieces, job: Job, index: int) -> Row:
    """Row `index` of a batch."""
    rng = random.Random(f"{job.seed}/{job.step}/{index}")
    names, weights = zip(*job.weights, strict=True)
    name = rng.choices(names, weights)[0]
    exact = rng.random() < job.exact and job.length >= EXACT_LENGTHS.get(name, 0)
    request = Request(name, job.length, exact, job.gap)
    for _ in range(ATTEMPTS):
        row = MAKERS[name](Desk(pieces, rng), request)
        if len(row.ids) <= job.length:
            return row
    raise AssertionError(f"{name} does not fit a row of {job.length}")


def make_batch(pieces: Pieces, job: Job) -> Batch:
    """Make all rows of a job and lay them out."""
    ids = np.full((job.rows, job.length), pieces.pad, dtype=np.int64)
    targets: list[int] = []
    weights: list[float] = []
    groups: list[int] = []
    tasks: list[str] = []
    for index in range(job.rows):
        row = make_row(pieces, job, index)
        ids[index, : len(row.ids)] = row.ids
        begin = len(weights)
        for answer in row.answers:
            size = answer.end - answer.start
            offset = index * job.length + answer.start
            targets += range(offset, offset + size)
            own = [1.0] * size
            for i in answer.lookups:
                own[i - answer.start] = LOOKUP_WEIGHT
            weights += own
            groups += [len(tasks)] * size
            tasks.append(row.task)
        scale = 1 / (sum(weights[begin:]) * job.rows)
        weights[begin:] = [weight * scale for weight in weights[begin:]]
    return Batch(
        ids,
        np.array(targets, dtype=np.int64),
        np.array(weights, dtype=np.float32),
        np.array(groups, dtype=np.int64),
        tasks,
    )
