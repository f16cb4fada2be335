"""Tables for the terminal, from records: tasks by methods, settings, throughput, the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shadowkv_cli.console import format_bytes, print_table
from shadowkv_cli.frontier import Doubt, FrontierPoint, panels, pareto_front, point_doubts, reason
from shadowkv_cli.run_config import EAGER
from shadowkv_cli.stats import Interval
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord, ThroughputRecord

MAX_METHOD_COLUMNS = 6
MAX_DIFFERENCE_COLUMNS = 2
NOTHING = "-"
UNTESTED = (
    "the prompts are not longer than what the method keeps, so full attention took its place."
)


@dataclass(frozen=True)
class Table:
    """What `console.print_table` takes."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        print_table(self.title, self.columns, self.rows, self.notes)


def format_interval(interval: Interval | None, *, signed: bool = False, digits: int = 1) -> str:
    """Estimate and bounds, like `93.8 [87.1, 97.2]`."""
    if interval is None:
        return NOTHING
    style = f"{'+' if signed else ''}.{digits}f"
    low, high = (format(v, style) for v in (interval.low, interval.high))
    return f"{interval.estimate:{style}} [{low}, {high}]"


def _number(value: float | None, digits: int = 0) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def _bytes(count: float | None) -> str:
    return NOTHING if count is None else format_bytes(count)


def _score(record: ScoreRecord | None) -> str:
    if record is None or record.score is None:
        return NOTHING if record is None else "failed"
    return format_interval(record.score) if record.tested else "not tested"


def _difference(record: ScoreRecord | None) -> str:
    if record is None or not record.tested:
        return NOTHING
    return format_interval(record.difference, signed=True)


def _name(context_length: int | None, task: str, several_lengths: bool) -> str:
    if context_length is None:
        return "average of all"
    return f"{context_length} {task}" if several_lengths else task


def _without_empty(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out columns in which no row says anything."""
    kept = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def score_table(records: Sequence[ScoreRecord], notes: Sequence[str] = ()) -> Table:
    """Tasks by methods; with more cells than fit beside each other, cells by lengths.

    Scores are 0 to 100 with their 95 % interval. With one or two methods beside full attention,
    the paired difference to it stands beside each.
    """
    cells = list(dict.fromkeys(r.cell for r in records))
    lengths = {r.context_length for r in records} - {None}
    notes = [*notes, *_score_notes(records)]
    if len(cells) > MAX_METHOD_COLUMNS:
        return _averages_table(records, cells, notes)
    found = {(r.context_length, r.task, r.cell): r for r in records}
    differ = {r.cell for r in records if r.difference is not None}
    with_difference = 0 < len(differ) <= MAX_DIFFERENCE_COLUMNS
    columns = ["task", "n"]
    for cell in cells:
        columns += [cell, "difference"] if with_difference and cell in differ else [cell]
    # A task that only a later cell has must not end up under the average over everything.
    keys = list(dict.fromkeys((r.context_length, r.task) for r in records))
    keys.sort(key=lambda k: (k[0] is None, k[0] or 0, k[1] == AVERAGE))
    rows = []
    for length, task in keys:
        here = [found.get((length, task, cell)) for cell in cells]
        counts = sorted({r.n for r in here if r is not None})
        count = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        row = [_name(length, task, len(lengths) > 1), count]
        for cell, record in zip(cells, here, strict=True):
            row.append(_score(record))
            if with_difference and cell in differ:
                row.append(_difference(record))
        rows.append(row)
    return Table("Score (0 to 100), 95 % interval", columns, rows, notes)


def _averages_table(
    records: Sequence[ScoreRecord], cells: Sequence[str], notes: list[str]
) -> Table:
    averages = {(r.cell, r.context_length): r for r in records if r.task == AVERAGE}
    lengths = list(dict.fromkeys(length for _, length in averages))
    columns = [
        "cell",
        "n",
        *("all lengths" if k is None else str(k) for k in lengths),
        "difference",
    ]
    rows = []
    for cell in cells:
        own = [averages.get((cell, length)) for length in lengths]
        last = next(r for r in reversed(own) if r is not None)
        rows.append([cell, str(last.n), *map(_score, own), _difference(last)])
    title = "Score (0 to 100), average over the tasks, 95 % interval"
    return Table(title, columns, rows, notes)


def _score_notes(records: Sequence[ScoreRecord]) -> list[str]:
    """What a reader must know to read the scores: failures, unequal n, untested cells."""
    notes = []
    tasks = [r for r in records if r.task != AVERAGE]
    failed: dict[str, int] = {}
    for r in tasks:
        if r.failed:
            failed[r.cell] = failed.get(r.cell, 0) + r.failed
    if failed:
        what = ", ".join(f"{cell} {count}" for cell, count in failed.items())
        notes.append(f"Failed samples, left out of the scores: {what}.")
    untested = list(dict.fromkeys(r.cell for r in tasks if not r.tested))
    if untested:
        notes.append(f"Not tested ({', '.join(untested)}): {UNTESTED}")
    if any(r.difference is not None for r in records):
        notes.append(
            "Difference to full attention in points, paired by sample (Tango's score interval)."
        )
    coverage: dict[str, set[tuple[int | None, str]]] = {}
    for record in tasks:
        coverage.setdefault(record.cell, set()).add((record.context_length, record.task))
    if len({frozenset(covered) for covered in coverage.values()}) > 1:
        notes.append("Averages are over different tasks: not every cell has every task yet.")
    return notes


def settings_table(records: Sequence[ScoreRecord]) -> Table:
    """What each cell attended and held, and how its average differs from full attention."""
    rows = []
    lengths = {r.context_length for r in records} - {None}
    for r in records:
        if r.task != AVERAGE or r.context_length is None:
            continue
        name = f"{r.context_length} {r.cell}" if len(lengths) > 1 else r.cell
        rows.append(
            [
                name,
                _number(r.budget_tokens),
                _number(r.outlier_tokens),
                _number(r.attended_tokens),
                _percent(r.active_share),
                _bytes(r.gpu_bytes),
                _bytes(r.host_bytes),
                _percent(r.hit_rate),
                _difference(r),
                NOTHING if r.differing is None else str(r.differing),
            ]
        )
    columns = ["cell", "budget", "outliers", "attended", "active", "device", "host", "hits"]
    columns += ["to full", "differ"]
    title = "What each method attended per step, in tokens, and held (means over the samples)"
    shown = _without_empty(columns, rows)
    notes = [
        "to full: points to full attention, average over the tasks; "
        "differ: answers whose text is not full attention's."
    ]
    return Table(title, *shown, notes if "to full" in shown[0] else [])


def throughput_table(records: Sequence[ThroughputRecord], notes: Sequence[str] = ()) -> Table:
    """Decode speed, step times and memory per cell, length and batch."""
    rows = [
        [
            r.cell,
            str(r.context_length),
            str(r.batch_size) if r.batch_rule.isdigit() else f"{r.batch_size} ({r.batch_rule})",
            format_interval(r.tokens_per_s) if r.tokens_per_s else "failed",
            format_interval(r.ratio, digits=2) if r.tested else "not tested",
            _number(r.step_ms_p50, 1),
            _number(r.step_ms_p99, 1),
            _number(r.predicted_step_ms, 1),
            _number(r.prefill_s, 1),
            _bytes(r.gpu_bytes),
            _bytes(r.host_bytes),
            _bytes(r.peak_memory_bytes),
            _percent(r.hit_rate),
            _bytes(r.prefill_peak_bytes),
            _bytes(r.prefill_allowed_bytes),
        ]
        for r in records
    ]
    columns = ["cell", "context", "batch", "tokens/s", "x full", "p50 ms", "p99 ms", "planned ms"]
    columns += ["prefill s", "device", "host", "peak", "hits", "peak of prefill", "allowed"]
    covered = [r.tokens_per_s.confidence for r in records if r.tokens_per_s]
    own = []
    if any(r.failed for r in records):
        own.append(f"Failed rounds, left out: {sum(r.failed for r in records)}.")
    if covered and min(covered) < 0.95:
        own.append(
            f"Intervals are the whole range of the rounds and cover {min(covered):.0%}: "
            "6 rounds or more give 95 %."
        )
    untested = list(dict.fromkeys(r.cell for r in records if not r.tested))
    if untested:
        own.append(f"Not tested ({', '.join(untested)}): {UNTESTED}")
    if any(r.method == EAGER for r in records):
        own.append(
            f"{EAGER}: full attention in transformers' own forward, SDPA, op by op; its keys and "
            "values are preallocated."
        )
    if any(r.state == "synthetic" for r in records):
        own.append("Synthetic state: random keys and values, so hit rates are not those of text.")
    shown = _without_empty(columns, rows)
    return Table("Decode throughput, median over rounds", *shown, [*own, *notes])


def frontier_table(
    points: Sequence[FrontierPoint], notes: Sequence[str] = (), *, with_frontier: bool = True
) -> Table:
    """Cells of a sweep by speed, with the frontier of each length and batch rule marked.

    `with_frontier` is False for random weights, whose scores mean nothing.
    """
    rows: list[list[str]] = []
    own: list[str] = []
    for (length, rule), panel in panels(points).items():
        front = pareto_front(panel) if with_frontier else []
        doubts = point_doubts(panel)
        rows += [
            [
                p.cell,
                f"{length}, {rule}",
                format_interval(p.tokens_per_s),
                format_interval(p.score) if p.tested else "not tested",
                doubts.get(id(p), "yes") if p in front else "",
                _percent(p.hit_rate_accuracy),
                _percent(p.hit_rate_throughput),
            ]
            for p in sorted(panel, key=lambda p: -p.tokens_per_s.estimate)
        ]
    for doubt in (doubt for doubt in Doubt if any(row[4] == doubt for row in rows)):
        own.append(
            f"{doubt}: on the frontier by its estimates, but {reason([doubt])} do not establish "
            "its order to a neighbour there."
        )
    elsewhere = sorted({p.score_length or 0 for p in points if p.score_length != p.context_length})
    if elsewhere:
        lengths = ", ".join("all lengths" if not n else f"{n} tokens" for n in elsewhere)
        own.append(
            f"Scores are of {lengths}, not of the context that was timed: a budget given as a "
            "share is another number of tokens there."
        )
    flagged = list(dict.fromkeys(p.cell for p in points if p.hit_rates_differ))
    if flagged:
        own.append(
            "Hit rates of accuracy and throughput differ by more than 5 points, so the speed is "
            f"not that of these texts: {', '.join(flagged)}."
        )
    columns = ["cell", "context, batch", "tokens/s", "score", "frontier"]
    columns += ["hits (accuracy)", "hits (throughput)"]
    return Table("Accuracy against throughput", columns, rows, [*own, *notes])


def loud_first(notes: Sequence[str]) -> list[str]:
    """A run's notes with that of random weights in front, as a warning."""
    loud = [f"WARNING: {note}" for note in notes if "random weights" in note.lower()]
    return [*loud, *(note for note in notes if f"WARNING: {note}" not in loud)]


def tables(
    scores: Sequence[ScoreRecord],
    throughput: Sequence[ThroughputRecord] = (),
    notes: Sequence[str] = (),
) -> list[Table]:
    """All tables that the records allow.

    `notes` (the manifest's) stand under the first, random weights before anything else: nobody may
    take those scores for a result.
    """
    notes = loud_first(notes)
    shown: list[Table] = []
    if scores:
        shown.append(score_table(scores, notes))
        if any(r.method != FULL and r.attended_tokens is not None for r in scores):
            shown.append(settings_table(scores))
    if throughput:
        shown.append(throughput_table(throughput, () if scores else notes))
    return shown
