"""The named averages of LongBench: categories, official means, lengths, difficulties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from shadowkv_cli.rowlog import Row
from shadowkv_cli.stats import Interval, macro_average, mean_interval
from shadowkv_cli.summary import (
    AVERAGE,
    FULL,
    ScoreRecord,
    chosen_rows,
    group_by,
    parts_of_score,
)
from shadowkv_cli.tables import NOTHING, Table, format_interval
from shadowkv_cli.tasks.longbench.definitions import LongBenchSet, longbench_sets
from shadowkv_cli.tasks.longbench.matching import chosen_letter
from shadowkv_cli.tasks.longbench.suites import LONGBENCH, LONGBENCH_E, LONGBENCH_V2

SUITES = (LONGBENCH, LONGBENCH_E, LONGBENCH_V2)
CODE = "code"
GROUP_ORDER = ("0-4k", "4-8k", "8k+", "easy", "hard", "short", "medium", "long")
FLAT_MEAN = "flat mean of 16 English and code sets"
UNPARSED = "answers that could not be read (%)"


@dataclass(frozen=True)
class NamedAverage:
    """One average of one cell, 0 to 100.

    Attributes:
        name: what it is over; how much of it is missing stands there too.
        context_length: of the samples, in tokens.
        value: None where what it needs is missing.
        tested: False if full attention answered every sample of it.
    """

    name: str
    context_length: int
    cell: str
    value: Interval | None
    tested: bool = True


def official_mean(language: str) -> str:
    """The name of the official average of a language."""
    return f"official mean of six categories, {language}"


def _mean(scores: Sequence[Interval]) -> Interval | None:
    return macro_average(scores) if scores else None


def category_averages(scores: Iterable[ScoreRecord]) -> list[NamedAverage]:
    """Per cell: the categories, the official mean of each language, and the flat mean of 16.

    An official or flat mean is given only where all of its sets have a score. As in LongBench's
    README, code counts in the means of both languages.
    """
    tasks = [r for r in scores if r.task != AVERAGE and r.context_length is not None]
    groups: dict[tuple[int, str], dict[str, ScoreRecord]] = {}
    for record in tasks:
        assert record.context_length is not None
        groups.setdefault((record.context_length, record.cell), {})[record.task] = record
    found: list[NamedAverage] = []
    for (length, cell), own in groups.items():
        found += _of_one_cell(length, cell, own)
    return found


def _of_one_cell(length: int, cell: str, own: dict[str, ScoreRecord]) -> list[NamedAverage]:
    sets = longbench_sets()
    found: list[NamedAverage] = []
    complete: dict[str, list[Interval]] = {"en": [], "zh": []}
    for category, language in dict.fromkeys((s.category, s.language) for s in sets.values()):
        members = [n for n, s in sets.items() if (s.category, s.language) == (category, language)]
        there = [own[n] for n in members if n in own]
        known = [r.score for r in there if r.score]
        if not there:
            continue
        name = category if language == CODE else f"{category}, {language}"
        if len(there) < len(members):
            name += f" ({len(there)} of {len(members)} sets)"
        value = _mean(known)
        found.append(NamedAverage(name, length, cell, value, any(r.tested for r in there)))
        if value is not None and len(known) == len(members):
            for each in ("en", "zh") if language == CODE else (language,):
                complete[each].append(value)
    tested = any(r.tested for r in own.values())
    for language, values in complete.items():
        if values and len(values) == len({s.category for s in sets.values()}):
            mean = macro_average(values)
            found.append(NamedAverage(official_mean(language), length, cell, mean, tested))
    flat = [own[n].score for n, s in sets.items() if _in_flat_mean(s) and n in own]
    known = [score for score in flat if score]
    if len(known) == sum(map(_in_flat_mean, sets.values())):
        found.append(NamedAverage(FLAT_MEAN, length, cell, macro_average(known), tested))
    return found


def _in_flat_mean(entry: LongBenchSet) -> bool:
    return entry.language in ("en", CODE)


def group_averages(rows: Iterable[Row], suite: str) -> list[NamedAverage]:
    """Per cell and task: the mean over the samples of each group, all samples counting the same.

    For LongBench v2 also over all of them, and the share of answers without a readable letter.
    """
    rows = list(rows)
    found: list[NamedAverage] = []
    for (length, task), here in group_by(rows, lambda r: (r["context_length"], r["task"])).items():
        full = [r for r in here if r["method"] == FULL]
        for cell, own in group_by(here, lambda r: r["cell"]).items():
            pairs, _ = chosen_rows(own if own[0]["method"] == FULL else [*own, *full])
            chosen = [row for row, _ in pairs]
            prefix = f"{task} " if suite == LONGBENCH_E else ""
            if suite == LONGBENCH_V2 and chosen:
                found.append(_pooled("overall", length, cell, chosen))
            for group in GROUP_ORDER:
                members = [r for r in chosen if group in (r.get("groups") or [])]
                if members:
                    found.append(_pooled(prefix + group, length, cell, members))
            if suite == LONGBENCH_V2 and chosen:
                unread = [float(chosen_letter(r["prediction"]) is None) for r in chosen]
                share = mean_interval(unread, num_references=1).scaled(100)
                found.append(NamedAverage(UNPARSED, length, cell, share))
    return found


def _pooled(name: str, length: int, cell: str, rows: Sequence[Row]) -> NamedAverage:
    references = fmean(map(parts_of_score, rows))
    value = mean_interval([r["score"] for r in rows], num_references=references).scaled(100)
    active = any(not r.get("dense_fallback", False) for r in rows)
    return NamedAverage(name, length, cell, value, active)


def named_averages(
    suite: str, scores: Iterable[ScoreRecord], rows: Iterable[Row]
) -> list[NamedAverage]:
    """All named averages of a suite; none for RULER."""
    if suite == LONGBENCH:
        return category_averages(scores)
    return group_averages(rows, suite) if suite in SUITES else []


def averages_as_rows(found: Iterable[NamedAverage]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {
            "name": one.name,
            "context_length": one.context_length,
            "cell": one.cell,
            "tested": one.tested,
            "n": one.value.n if one.value else 0,
            "value": one.value.estimate if one.value else None,
            "value_low": one.value.low if one.value else None,
            "value_high": one.value.high if one.value else None,
        }
        for one in found
    ]


def averages_table(found: Sequence[NamedAverage]) -> Table:
    """Averages by cells."""
    cells = list(dict.fromkeys(one.cell for one in found))
    several = len({one.context_length for one in found}) > 1
    by_key = {(one.context_length, one.name, one.cell): one for one in found}
    rows = []
    for length, name in dict.fromkeys((one.context_length, one.name) for one in found):
        row = [f"{length} {name}" if several else name]
        here = [by_key.get((length, name, cell)) for cell in cells]
        row.append(str(max(one.value.n if one and one.value else 0 for one in here)))
        for one in here:
            shown = NOTHING if one is None else format_interval(one.value)
            row.append(shown if one is None or one.tested else "not tested")
        rows.append(row)
    return Table("Averages (0 to 100), 95 % interval", ["average", "n", *cells], rows)
