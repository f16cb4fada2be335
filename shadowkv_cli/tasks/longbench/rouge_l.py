"""ROUGE-L as LongBench takes it from the package `rouge` 1.0.1, with its recursion under control.

The package follows a common subsequence by recursion, one frame a word. Where two sentences have
about 990 words together, Python's limit ends it, and LongBench's `rouge_score` turns that (like any
exception) into a score of 0. Here the true value is the default; `official=True` gives that 0.
THUDM/LongBench 2e00731 (LongBench/metrics.py), pltrdy/rouge#19.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shadowkv_cli.tasks.longbench.packages import rouge_scorer, segment

OFFICIAL_ROOM = 996
"""Calls that may still nest below LongBench's `rouge_score`: Python's own limit of 1,000 less the
module, `scorer`, the function itself and the interpreter's entry."""


def rouge_l(prediction: str, reference: str, *, official: bool = False, depth: int = 0) -> float:
    """Summary-level ROUGE-L, F measure, from 0 to 1; 0 where either side has no sentence.

    Args:
        official: give 0.0 where the package would exceed Python's default recursion limit.
        depth: further frames that LongBench has on its stack.

    Raises:
        ShadowKVError: the package is not installed.
    """
    scorer = rouge_scorer()
    limit = sys.getrecursionlimit() + len(prediction.split()) + len(reference.split())
    if official:
        limit = _frames() + OFFICIAL_ROOM
        with _recursion_limit(limit):
            limit += OFFICIAL_ROOM - depth - _room()
    try:
        with _recursion_limit(limit):
            scores = scorer.get_scores([prediction], [reference], avg=True)
    except (ValueError, ZeroDivisionError):  # no sentence, no word
        return 0.0
    except RecursionError:
        if not official:
            raise
        return 0.0
    return float(scores["rouge-l"]["f"])


def rouge_l_zh(prediction: str, reference: str, *, official: bool = False) -> float:
    """The same over the words that jieba finds (`rouge_zh_score`)."""
    texts = (" ".join(segment(text)) for text in (prediction, reference))
    return rouge_l(*texts, official=official, depth=1)


def _frames() -> int:
    """Frames on the stack of the caller."""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1  # type: ignore[assignment]
    return count


def _room(used: int = 0) -> int:
    """Calls that may still nest below the caller; C functions on the stack count too."""
    try:
        return _room(used + 1)
    except RecursionError:
        return used


@contextmanager
def _recursion_limit(limit: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
