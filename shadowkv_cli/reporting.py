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
from shadowkv_cli.length_averages import SUITE as RULER
from shadowkv_cli.length_averages import (
    length_summaries,
    summaries_as_rows,
    summaries_for_csv,
    summaries_table,
)
from shadowkv_cli.paper_rows import paper_comparison
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
from shadowkv_cli.tasks.ruler.definitions import definitions
from shadowkv_cli.times import times_as_rows, times_of, times_table


def more_of_the_scores(
    suite: str, scores: Sequence[ScoreRecord], rows: Sequence[Row], model: str = ""
) -> tuple[dict[str, Any], list[Table]]:
    """What stands beside the scores: RULER's and LongBench's averages, where methods were active.

    RULER's table over lengths needs several of them, the paper's rows one of its models. Activity
    is shown for LongBench, whose prompts are often short, and wherever a method was not active for
    some sample. Returns the same as fields for JSON and as tables.
    """
    if not scores:
        return {}, []
    averages, activity = named_averages(suite, scores, rows), activity_of(rows, scores)
    fields = {
        "averages": averages_as_rows(averages),
        "activity": activity_as_rows(activity),
    }
    lengths = length_summaries(scores, rows) if suite == RULER and scores else []
    if lengths:
        fields["lengths"] = summaries_as_rows(lengths)
    beside = paper_comparison(suite, model, scores)
    if beside is not None:
        fields["paper"] = beside[1]
    shown = [averages_table(averages)] if averages else []
    if len({n for one in lengths for n in one.by_length}) > 1:
        shown.append(summaries_table(lengths, all_tasks=len(definitions())))
    if beside is not None:
        shown.append(beside[0])
    if activity and (suite in SUITES or any(a.active < a.n for a in activity)):
        shown.append(activity_table(activity))
    return fields, shown


def report_run(path: Path, *, as_json: bool) -> dict[str, Any]:
    """Summarise a run's rows, write its summary.csv and print tables or JSON.

    Returns the object that `--json` prints.
    """
    run = read_run(path)
    scores, speeds = score_records(run.predictions), throughput_records(run.throughput)
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
    identity = run.manifest["identity"]
    suite, model = str(identity.get("data", "")), str(identity.get("model", ""))
    more, more_tables = more_of_the_scores(suite, scores, run.predictions, model)
    times = times_of(run.predictions)
    payload |= more | {"times": times_as_rows(times)}
    lengths = length_summaries(scores, run.predictions) if suite == RULER and scores else []
    write_summary_csv(path / SUMMARY, scores, speeds, summaries_for_csv(lengths))
    if as_json:
        print_json(payload)
        return payload
    shown = [*tables(scores, speeds, run.notes), *more_tables]
    if times:
        shown.append(times_table(times, () if shown else run.notes))
    if scores and speeds:
        points = join_sweep(scores, speeds)
        shown.append(frontier_table(points, with_frontier=not random_weights))
    for table in shown:
        table.show()
    if found:
        print(found)
    return payload
