"""RULER's summary over context lengths: averages, weighted averages, effective length, nulls.

As RULER's README has them (NVIDIA/RULER c3f5e3b): the score of a length is the unweighted mean of
its tasks; the weights of the two weighted averages rise or fall by one from length to length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shadowkv_cli.rowlog import Row
from shadowkv_cli.stats import Interval, macro_average
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord, chosen_rows
from shadowkv_cli.tables import Table, format_interval
from shadowkv_cli.tasks.metrics import replace_control_characters

SUITE = "ruler"
AVERAGES = ("Avg", "wAvg (inc)", "wAvg (dec)")
THRESHOLD = 85.6
"""Average of Llama-2-7B at 4K, from which RULER calls a length effective."""


@dataclass(frozen=True)
class LengthSummary:
    """One cell over all context lengths; scores 0 to 100.

    Attributes:
        by_length: the average over the tasks by length in tokens, ascending; None if all failed.
        tasks: number of tasks with a score at each of these lengths.
        tested: False if full attention answered every sample.
        average, rising, falling: over the lengths, unweighted, with weights 1, 2, … and …, 2, 1;
            None where a length has no score.
        effective_length: the longest whose average reaches 85.6; None if none does.
        nulls: answers of which nothing is left when control characters and spaces are taken away.
    """

    cell: str
    by_length: dict[int, Interval | None]
    tasks: dict[int, int]
    tested: bool
    average: Interval | None
    rising: Interval | None
    falling: Interval | None
    effective_length: int | None
    nulls: int


def _nulls(rows: Sequence[Row], cell: str) -> int:
    own = [r for r in rows if r["cell"] == cell]
    full = [] if own[0]["method"] == FULL else [r for r in rows if r["method"] == FULL]
    chosen, _ = chosen_rows([*own, *full])
    return sum(not replace_control_characters(row["prediction"]) for row, _ in chosen)


def length_summaries(scores: Iterable[ScoreRecord], rows: Iterable[Row]) -> list[LengthSummary]:
    """One summary of each cell. `scores` are the records of the same rows."""
    rows = list(rows)
    by_cell: dict[str, list[ScoreRecord]] = {}
    for record in scores:
        if record.context_length is not None:
            by_cell.setdefault(record.cell, []).append(record)
    found = []
    for cell, own in by_cell.items():
        averages = {r.context_length: r.score for r in own if r.task == AVERAGE}
        by_length = {n: averages[n] for n in sorted(n for n in averages if n is not None)}
        tasks = {
            n: sum(r.task != AVERAGE and r.context_length == n and r.score is not None for r in own)
            for n in by_length
        }
        known = [score for score in by_length.values() if score is not None]
        complete = bool(known) and len(known) == len(by_length)
        rising = list(range(1, len(known) + 1))
        reached = [n for n, s in by_length.items() if s is not None and s.estimate >= THRESHOLD]
        found.append(
            LengthSummary(
                cell,
                by_length,
                tasks,
                any(r.tested for r in own),
                macro_average(known) if complete else None,
                macro_average(known, rising) if complete else None,
                macro_average(known, rising[::-1]) if complete else None,
                max(reached, default=None),
                _nulls(rows, cell),
            )
        )
    return found


def summaries_as_rows(found: Iterable[LengthSummary]) -> list[dict[str, Any]]:
    """For JSON: intervals as estimate and bounds."""

    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return [value.estimate, value.low, value.high]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return value

    return [{name: plain(value) for name, value in vars(one).items()} for one in found]


def summaries_for_csv(found: Iterable[LengthSummary]) -> list[Row]:
    """The averages over several lengths as rows of summary.csv: one per cell and average."""
    rows: list[Row] = []
    for one in found:
        if len(one.by_length) < 2:
            continue
        values = (one.average, one.rising, one.falling)
        for name, value in zip(AVERAGES, values, strict=True):
            row: Row = {"phase": "lengths", "cell": one.cell, "task": name}
            if value is not None:
                row |= {"score": value.estimate, "score_low": value.low, "score_high": value.high}
                row["n"] = value.n
            rows.append(row | {"effective_length": one.effective_length, "nulls": one.nulls})
    return rows


def summaries_table(found: Sequence[LengthSummary], *, all_tasks: int) -> Table:
    """Methods by lengths, as RULER's table of models; `all_tasks` is how many RULER has."""
    lengths = sorted({n for one in found for n in one.by_length})
    columns = ["method", *map(str, lengths), *AVERAGES]
    columns += ["effective length", "nulls"]
    rows = []
    for one in found:
        cells = [format_interval(one.by_length.get(n)) for n in lengths]
        cells += [format_interval(v) for v in (one.average, one.rising, one.falling)]
        reached = f"under {lengths[0]}" if one.effective_length is None else one.effective_length
        cells = [*cells, str(reached)] if one.tested else ["not tested"] * (len(cells) + 1)
        rows.append([one.cell, *cells, str(one.nulls)])
    notes = [
        "Avg: mean over the lengths; inc and dec: weights that rise or fall with the length. "
        f"Effective length: the longest with an average of at least {THRESHOLD}. Nulls: empty "
        "answers."
    ]
    fewest = min(count for one in found for count in one.tasks.values())
    if fewest < all_tasks:
        notes.append(
            f"Averages are over as few as {fewest} of RULER's {all_tasks} tasks, so they are not "
            "those of its table."
        )
    return Table("RULER by length: score (0 to 100), 95 % interval", columns, rows, notes)
