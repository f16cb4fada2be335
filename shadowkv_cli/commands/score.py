"""shadowkv score results/demo/predictions.jsonl --data datasets/demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shadowkv_cli.console import notice, print_json
from shadowkv_cli.errors import EXIT_INCOMPLETE
from shadowkv_cli.options import ConfigOption, DataOption, JsonOption


def score(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS.jsonl", help="Rows with at least id and prediction."),
    ],
    data: DataOption,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Score stored predictions again, ours or another tool's.

    Exit code 3 if samples of the data have no prediction.

    Example: shadowkv score results/demo/predictions.jsonl --data datasets/demo
    """
    from shadowkv_cli.reporting import more_of_the_scores
    from shadowkv_cli.rescoring import rescore
    from shadowkv_cli.summary import records_as_rows, score_records
    from shadowkv_cli.tables import tables
    from shadowkv_cli.tasks.rows import Dataset

    result = rescore(predictions, data)
    records = score_records(result.rows)
    manifest = Dataset.open(data).manifest
    note = manifest.get("note")
    more, more_tables = more_of_the_scores(str(manifest.get("suite", "")), records, result.rows)
    if json:
        counts = {"missing": result.missing, "echoes": result.echoes}
        print_json({"records": records_as_rows(records), **counts, "note": note or "", **more})
    else:
        for table in [*tables(records, notes=[note] if note else []), *more_tables]:
            table.show()
    if result.echoes:
        notice(
            f"Warning: {len(result.echoes)} predictions contain the end of their prompt, which can "
            f"score by itself; the first is {result.echoes[0]}."
        )
    failed = sum(row["error"] is not None for row in result.rows)
    for cell, count in result.missing.items():
        notice(f"{cell}: {count} samples of the data have no prediction.")
    if result.missing or failed:
        raise typer.Exit(EXIT_INCOMPLETE)
