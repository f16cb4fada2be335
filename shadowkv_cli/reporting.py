"""What a finished run shows: its tables or one JSON object, and its summary.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shadowkv_cli.console import print_json
from shadowkv_cli.findings import finding
from shadowkv_cli.frontier import join_sweep
from shadowkv_cli.results import SUMMARY, read_run
from shadowkv_cli.summary import (
    records_as_rows,
    score_records,
    throughput_records,
    write_summary_csv,
)
from shadowkv_cli.tables import frontier_table, tables


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
    if as_json:
        print_json(payload)
        return payload
    shown = tables(scores, speeds, run.notes)
    if scores and speeds:
        points = join_sweep(scores, speeds)
        shown.append(frontier_table(points, with_frontier=not random_weights))
    for table in shown:
        table.show()
    if found:
        print(found)
    return payload
