"""What a sweep found, in one sentence, with its intervals."""

from __future__ import annotations

from collections.abc import Sequence

from shadowkv_cli.stats import Interval
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord, ThroughputRecord

NEAR = 2.0
"""Points that a cell may lose and still be worth naming for what it saves."""


def _averages(scores: Sequence[ScoreRecord]) -> list[ScoreRecord]:
    """One average a cell: over all lengths where there are several."""
    found: dict[str, ScoreRecord] = {}
    for record in scores:
        if record.task == AVERAGE and (record.cell not in found or record.context_length is None):
            found[record.cell] = record
    return list(found.values())


def _interval(value: Interval, digits: int = 1, sign: str = "") -> str:
    low, high = (format(v, f"{sign}.{digits}f") for v in (value.low, value.high))
    return f"{value.estimate:{sign}.{digits}f} [{low}, {high}]"


def _choose(averages: Sequence[ScoreRecord]) -> ScoreRecord | None:
    """The tested cell that attends least of those at most `NEAR` points below full attention.

    By the estimates: among few samples the intervals alone would admit any cell. Without one, the
    cell that loses least.
    """
    cells = [r for r in averages if r.method == "shadowkv" and r.tested and r.difference]
    near = [r for r in cells if r.difference and r.difference.estimate >= -NEAR]
    if near:
        return min(near, key=lambda r: r.attended_tokens or 0)
    return max(cells, key=lambda r: r.difference.estimate if r.difference else 0, default=None)


def finding(
    scores: Sequence[ScoreRecord],
    throughput: Sequence[ThroughputRecord],
    *,
    random_weights: bool,
) -> str | None:
    """Say what ShadowKV cost and bought; None where there is no pair with full attention.

    Args:
        scores, throughput: records of one run.
        random_weights: the scores mean nothing, so only speed is told.
    """
    averages = _averages(scores)
    full = next((r for r in averages if r.method == FULL), None)
    cell = _choose(averages)
    speeds = [r for r in throughput if r.ratio and cell and r.cell == cell.cell]
    speed = ""
    if speeds:
        fastest = max(speeds, key=lambda r: r.context_length)
        assert fastest.ratio is not None
        speed = (
            f" It decodes {_interval(fastest.ratio, 2)} times as fast as full attention at "
            f"{fastest.context_length:,} tokens, batch {fastest.batch_size}."
        )
    if cell is None or full is None or full.score is None or cell.score is None:
        return None
    if random_weights:
        return f"Found: nothing about accuracy, the weights are random.{speed}"
    assert cell.difference is not None
    others = sum(r.method == "shadowkv" and r.tested for r in averages)
    among = f" (chosen among {others} cells)" if others > 1 else ""
    kept = f"attending {cell.attended_tokens:,.0f} of {full.attended_tokens:,.0f} tokens"
    verdict = "below full attention"
    if cell.difference.high >= 0:
        verdict = "which these samples do not tell from none"
    gap, ours, theirs = _interval(cell.difference, sign="+"), cell.score, full.score
    return (
        f"Found: {cell.cell}{among}, {kept}, scores {_interval(ours)} against full attention's "
        f"{_interval(theirs)}: a difference of {gap} points, {verdict} (95 % intervals, "
        f"n = {cell.n}).{speed}"
    )
