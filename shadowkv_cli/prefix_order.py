"""Samples in the order in which neighbours begin alike, and how much of them that is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby

from shadowkv_cli.config import LEAST_SHARED_TOKENS
from shadowkv_cli.tasks.rows import Sample


def by_beginning(samples: Sequence[Sample]) -> list[Sample]:
    """Sort the samples of each task and length by their text, in place of theirs in the data.

    Whatever a sample shares with any other before it, it then shares with the one just before. By
    text, not by tokens: these begin alike where texts do, and nobody has to encode all at once.
    """
    ordered: list[Sample] = []
    for _, alike in groupby(samples, lambda sample: (sample.context_length, sample.task)):
        ordered += sorted(alike, key=lambda sample: sample.text)
    return ordered


def shared_characters(one: str, other: str) -> int:
    """Characters that two texts have in common before they first differ."""
    shorter = min(len(one), len(other))
    return bisect_left(range(1, shorter + 1), True, key=lambda n: one[:n] != other[:n])


def expected_reuse(batches: Sequence[Sequence[Sample]], num_workers: int) -> dict[str, int]:
    """About how many tokens of each sample are taken over, by its id.

    A worker has the batch before the one it is at; of texts that are sorted, the nearest shares
    most. Two workers go from the front and from the back (`side_by_side`), more share out the back
    in turn. Tokens are counted in proportion to characters.
    """
    reused: dict[str, int] = {}
    apart = max(1, num_workers - 1)
    for number, batch in enumerate(batches):
        earlier = batches[number - apart] if number >= apart else ()
        before = earlier[-1] if earlier else None
        for sample in batch:
            reused[sample.id] = _shared_tokens(sample, before) if before is not None else 0
            before = sample
    return reused


def _shared_tokens(sample: Sample, other: Sample) -> int:
    if sample.context_length != other.context_length:
        return 0  # of another session
    share = shared_characters(sample.text, other.text) / len(sample.text)
    tokens = min(int(share * sample.prompt_tokens), sample.prompt_tokens - 1)
    return tokens if tokens >= LEAST_SHARED_TOKENS else 0
