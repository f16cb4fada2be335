"""Accuracy and throughput of the same cells side by side, and which of them nothing beats."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shadowkv_cli.stats import Interval
from shadowkv_cli.summary import AVERAGE, ScoreRecord, ThroughputRecord

HIT_RATE_TOLERANCE = 0.05
"""Share of hits by which the two phases may differ before a cell is flagged."""

LEAST_CONFIDENCE = 0.9
"""What an interval of speed must cover to establish an order: 5 rounds cover 94 %."""

LEAST_ROUNDS = next(n for n in itertools.count(1) if 1 - 2 ** (1 - n) >= LEAST_CONFIDENCE)
"""Rounds whose whole range covers that much (see `stats.median_interval`)."""


class Doubt(StrEnum):
    """Why the order of two neighbours on the front is not established."""

    OVERLAP = "overlaps"
    FEW_ROUNDS = "few rounds"


@dataclass(frozen=True)
class FrontierPoint:
    """One cell: its score (0 to 100) and its decode tokens/s at one length and batch rule.

    Attributes:
        score_length: the length that the score is of; None: averaged over several lengths.
        tested: False if full attention answered every sample, or decoded in the method's place.
    """

    cell: str
    method: str
    settings: dict[str, Any]
    budget_tokens: float | None
    score: Interval
    score_length: int | None
    tested: bool
    tokens_per_s: Interval
    context_length: int
    batch_rule: str
    batch_size: int
    hit_rate_accuracy: float | None
    hit_rate_throughput: float | None

    @property
    def hit_rates_differ(self) -> bool:
        """Whether the phases' hit rates are so far apart that the speed is of other work."""
        a, b = self.hit_rate_accuracy, self.hit_rate_throughput
        return a is not None and b is not None and abs(a - b) > HIT_RATE_TOLERANCE


def _average_at(records: Sequence[ScoreRecord], length: int) -> ScoreRecord | None:
    """The average at that length, else over everything that was measured.

    Its score may be None, where a task failed altogether: then no other length stands in for it.
    """
    averages = [r for r in records if r.task == AVERAGE]
    at_length = [r for r in averages if r.context_length == length]
    overall = [r for r in averages if r.context_length is None]
    found = at_length or overall or averages
    return found[0] if found else None


def join_sweep(
    scores: Sequence[ScoreRecord], throughput: Sequence[ThroughputRecord]
) -> list[FrontierPoint]:
    """Points of all cells that have both; one per length and batch rule of the throughput.

    The score is the one at the throughput's length if the run has it, else the average over all
    of the run's lengths.
    """
    points = []
    for speed in throughput:
        own = [r for r in scores if (r.cell, r.settings) == (speed.cell, speed.settings)]
        average = _average_at(own, speed.context_length)
        if average is None or average.score is None or speed.tokens_per_s is None:
            continue
        points.append(
            FrontierPoint(
                cell=speed.cell,
                method=speed.method,
                settings=speed.settings,
                budget_tokens=average.budget_tokens,
                score=average.score,
                score_length=average.context_length,
                tested=average.tested and speed.tested,
                tokens_per_s=speed.tokens_per_s,
                context_length=speed.context_length,
                batch_rule=speed.batch_rule,
                batch_size=speed.batch_size,
                hit_rate_accuracy=average.hit_rate,
                hit_rate_throughput=speed.hit_rate,
            )
        )
    return points


def panels(points: Sequence[FrontierPoint]) -> dict[tuple[int, str], list[FrontierPoint]]:
    """Points that may be compared with each other: of one context length and batch rule."""
    found: dict[tuple[int, str], list[FrontierPoint]] = {}
    for point in points:
        found.setdefault((point.context_length, point.batch_rule), []).append(point)
    return found


def pareto_front(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Points that no other beats in one of score and speed without losing in the other.

    By estimates alone, slowest first; of equal points the first. Cells that were not tested are
    left out: their score is full attention's.
    """
    front: list[FrontierPoint] = []
    order = sorted(
        (p for p in points if p.tested),
        key=lambda p: (-p.tokens_per_s.estimate, -p.score.estimate),
    )
    for point in order:
        if not front or point.score.estimate > front[-1].score.estimate:
            front.append(point)
    return front[::-1]


def doubt_between(a: FrontierPoint, b: FrontierPoint) -> Doubt | None:
    """Why the order of the two is not established; None if it is.

    Their intervals must be apart in score and in speed, and those of speed must be of enough
    rounds: the interval of one or two is their range, which says next to nothing.
    """
    if a.score.overlaps(b.score) or a.tokens_per_s.overlaps(b.tokens_per_s):
        return Doubt.OVERLAP
    if min(p.tokens_per_s.confidence for p in (a, b)) < LEAST_CONFIDENCE:
        return Doubt.FEW_ROUNDS
    return None


def unresolved_pairs(
    points: Sequence[FrontierPoint],
) -> list[tuple[FrontierPoint, FrontierPoint, Doubt]]:
    """Neighbours on the front whose order is not established, and why.

    A front of one point is held against every other point: where both intervals overlap, it was
    not shown to be better in anything.
    """
    front = pareto_front(points)
    if len(front) == 1:
        best = front[0]
        return [
            (best, p, Doubt.OVERLAP)
            for p in points
            if p is not best
            and p.tested
            and p.score.overlaps(best.score)
            and p.tokens_per_s.overlaps(best.tokens_per_s)
        ]
    doubts = ((a, b, doubt_between(a, b)) for a, b in itertools.pairwise(front))
    return [(a, b, doubt) for a, b, doubt in doubts if doubt]


def point_doubts(points: Sequence[FrontierPoint]) -> dict[int, Doubt]:
    """By `id` of a point, why its order to a neighbour is not established; overlaps come first."""
    found: dict[int, Doubt] = {}
    for a, b, doubt in unresolved_pairs(points):
        for p in (a, b):
            if found.get(id(p)) != Doubt.OVERLAP:
                found[id(p)] = doubt
    return found


def reason(doubts: Collection[Doubt]) -> str:
    """What these doubts come from, as the subject of `do not establish an order`."""
    subjects = {
        Doubt.OVERLAP: "intervals that overlap",
        Doubt.FEW_ROUNDS: f"fewer than {LEAST_ROUNDS} rounds",
    }
    return " and ".join(text for doubt, text in subjects.items() if doubt in doubts)


def frontier_is_resolved(points: Sequence[FrontierPoint]) -> bool:
    """Whether the order of all neighbours on the front is established."""
    return not unresolved_pairs(points)
