"""Where the documents that hold an answer stand, and how `--shuffle-gold` spreads them.

RULER's fixed order puts them at one place for a given number of documents: a trap for methods that
depend on position. Chance alone leaves gaps over few samples; a low-discrepancy sequence does not.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point, in [0, 1): van der Corput's sequence."""
    value, place = 0.0, 1.0 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * place
        place /= base
    return value


def gold_fractions(seed: int, stream: str, index: int, count: int) -> list[float]:
    """Places in [0, 1) of that many documents of sample `index`, even over the samples.

    Halton's sequence, shifted by what seed and stream (task and length) give.
    """
    rng = random.Random(f"{seed}/{stream}/gold")
    bases = [BASES[i % len(BASES)] for i in range(count)]
    return [(radical_inverse(index + 1, base) + rng.random()) % 1.0 for base in bases]


def gold_places(numbers: Iterable[int], gold: Sequence[int]) -> list[int]:
    """Numbers in the prompt, from 1, of the documents that hold the answer."""
    wanted = set(gold)
    return [place for place, number in enumerate(numbers, start=1) if number in wanted]


def moved(numbers: Sequence[int], gold: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """The same documents with each gold one at its fraction; others keep their order."""
    left = list(numbers)
    for number in gold:
        if number in left:
            left.remove(number)
    for number, fraction in zip(gold, fractions, strict=True):
        if number in numbers:
            left.insert(round(fraction * len(left)), number)
    return left
