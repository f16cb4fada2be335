"""What a finished run shows: its tables or one JSON object, and its summary.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shadowkv_cli.activity import activity_as_rows, activity_of, activity_table
from shadowkv_cli.averages import SUITES, averages_as_rows, averages_table, named_averages
from shadowkv_cli.console import print_json
from shadowkv_cli.findings import finding
from shadowkv_cli.frontier import join_sweep
from shadowkv_cli.results import SUMMARY, read_run
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import (
    ScoreRecord,
    records_as_rows,
    score_records,
    throughput_records,
    write_summary_csv,
)
from shadowkv_cli.tables import Table, frontier_table, tables


def more_of_the_scores(
    suite: str, scores: Sequence[ScoreRecord], rows: Sequence[Row]
) -> tuple[dict[str, Any], list[Table]]:
    """What stands beside the scores: LongBench's named averages, and where methods were active.

    Activity is shown for LongBench, whose prompts are often short, and wherever a method was not
    active for some sample. Returns the same as fields for JSON and as tables.
    """
    averages, activity = named_averages(suite, scores, rows), activity_of(rows, scores)
    fields = {
        "averages": averages_as_rows(averages),
        "activity": activity_as_rows(activity),
    }
    shown = [averages_table(averages)] if averages else []
    if activity and (suite in SUITES or any(a.active < a.n for a in activity)):
        shown.append(activity_table(activity))
    return fields, shown


def report_run(path: Path, *, as_json: bool) -> dict[str, Any]:
    """Summarise a run's rows, write its summary.csv and print tables or JSON.

    Returns the object that `--json` prints.
    """
    run = read_run(path)
    scores, speeds = score_records(run.predictions), throughput_records(run.throughput)
    write_summary_csv(path / SUMMARY, scores, speeds)
    random_weights = run.flag("random_weights")
    found = finding(scores, speeds, random_weights=random_weights)
    payload = {
        "run": str(path),
        "kind": run.manifest["kind"],
        "notes": run.notes,
        "flags": run.manifest.get("flags", {}),
        "finding": found,
        "records": records_as_rows([*scores, *speeds]),
    }
    suite = str(run.manifest["identity"].get("data", ""))
    more, more_tables = more_of_the_scores(suite, scores, run.predictions)
    payload |= more
    if as_json:
        print_json(payload)
        return payload
    shown = [*tables(scores, speeds, run.notes), *more_tables]
    if scores and speeds:
        points = join_sweep(scores, speeds)
        shown.append(frontier_table(points, with_frontier=not random_weights))
    for table in shown:
        table.show()
    if found:
        print(found)
    return payload
