"""For how many samples a method was active at all: short prompts are answered by full attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from shadowkv_cli.rowlog import Row
from shadowkv_cli.stats import Interval
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord, chosen_rows, group_by, score_records
from shadowkv_cli.tables import NOTHING, Table, format_interval


@dataclass(frozen=True)
class Activity:
    """One cell over all samples of a run, and over those that it answered itself.

    Attributes:
        n, active: samples with a score, and those of them that the method answered.
        attended_share: mean share of the tokens there that a step attended; None if unknown.
        active_attended_share: the same over the active samples.
        score, difference: over all samples, averaged over the tasks; 0 to 100, points.
        active_score, active_difference: the same over the active samples; None without any.
    """

    cell: str
    n: int
    active: int
    attended_share: float | None
    active_attended_share: float | None
    score: Interval | None
    difference: Interval | None
    active_score: Interval | None
    active_difference: Interval | None


def attended_share(row: Row) -> float | None:
    """Share of a sample's tokens, generated ones included, that a step attended at the end."""
    audit = row.get("audit") or {}
    attended, prompt = audit.get("attended_tokens"), row.get("prompt_tokens")
    if attended is None or not prompt:
        return None
    return min(1.0, float(attended / (prompt + (audit.get("generated") or 0))))


def _average(records: Iterable[ScoreRecord], cell: str) -> ScoreRecord | None:
    own = [r for r in records if r.cell == cell and r.task == AVERAGE]
    return own[-1] if own else None


def _share(rows: Sequence[Row]) -> float | None:
    known = [share for row in rows if (share := attended_share(row)) is not None]
    return fmean(known) if known else None


def activity_of(rows: Iterable[Row], scores: Sequence[ScoreRecord]) -> list[Activity]:
    """Activity of every cell but full attention, in the order of the rows.

    Cells of which no row says whether it was active, as of another tool, are left out. `scores` are
    the records of the same rows.
    """
    rows = list(rows)
    full = [row for row in rows if row["method"] == FULL]
    cells = group_by((r for r in rows if r["method"] != FULL), lambda r: r["cell"])
    found = []
    for cell, own in cells.items():
        if all(row.get("dense_fallback") is None for row in own):
            continue
        chosen = [row for row, _ in chosen_rows([*own, *full])[0]]
        active = [row for row in chosen if not row.get("dense_fallback")]
        ids = {row["id"] for row in active}
        everything = only = _average(scores, cell)
        if len(active) < len(chosen):
            records = score_records(r for r in [*own, *full] if r["id"] in ids)
            only = _average(records, cell)
        found.append(
            Activity(
                cell,
                len(chosen),
                len(active),
                _share(chosen),
                _share(active),
                everything.score if everything else None,
                everything.difference if everything else None,
                only.score if only else None,
                only.difference if only else None,
            )
        )
    return found


def activity_as_rows(found: Iterable[Activity]) -> list[dict[str, Any]]:
    """For JSON: intervals as estimate and bounds."""

    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return [value.estimate, value.low, value.high]
        return value

    return [{name: plain(value) for name, value in vars(one).items()} for one in found]


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"


def activity_table(found: Sequence[Activity]) -> Table:
    """Two rows a cell: over all samples, and over those that the method itself answered."""
    rows = []
    for one in found:
        signed = format_interval(one.difference, signed=True)
        score = format_interval(one.score) if one.active else "not tested"
        count = f"{one.active} of {one.n}"
        rows.append([one.cell, count, _percent(one.attended_share), score, signed])
        if one.active:
            only = format_interval(one.active_difference, signed=True)
            rows.append(
                [
                    f"{one.cell}, active only",
                    str(one.active),
                    _percent(one.active_attended_share),
                    format_interval(one.active_score),
                    only,
                ]
            )
        else:
            rows[-1][-1] = NOTHING
    return Table(
        "For how many samples each method was active",
        ["cell", "active", "attended", "score", "to full"],
        rows,
        [
            "attended: mean share of a sample's tokens; the samples where a method was not active "
            "are not longer than what it keeps, and full attention answered them."
        ],
    )
