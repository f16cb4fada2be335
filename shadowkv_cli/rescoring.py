"""Score stored predictions again, ours or another tool's, against a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowkv_cli.errors import UsageError
from shadowkv_cli.rowlog import Row, read_rows
from shadowkv_cli.tasks.metrics import score
from shadowkv_cli.tasks.rows import Dataset, Sample

UNNAMED_CELL = "predictions"
ECHO_CHARACTERS = 40
SHORTEST_ECHO = 16
"""Shorter pieces of a prompt may stand in an honest answer."""


FIELD_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("prediction", "cell", "method", "error"), (str | None, "a text")),
    **dict.fromkeys(("settings", "audit"), (dict | None, "an object")),
    **dict.fromkeys(
        ("sparse_budget_tokens", "outlier_tokens", "gpu_bytes", "host_bytes", "hit_rate"),
        (int | float | None, "a number"),
    ),
    "pass": (int | None, "a whole number"),
    "dense_fallback": (bool | None, "true, false"),
}
"""Fields of a prediction that are used where a row has them."""


@dataclass(frozen=True)
class Rescored:
    """Rows as `summary.score_records` takes them, and what is wrong with the predictions.

    Attributes:
        missing: samples of the dataset that a cell has no prediction for, by cell.
        echoes: ids of predictions that contain the end of their prompt.
    """

    rows: list[Row]
    missing: dict[str, int]
    echoes: list[str]


def read_samples(dataset: Dataset) -> dict[str, Sample]:
    """All samples of a dataset by id."""
    return {
        sample.id: sample
        for length in dataset.context_lengths
        for task in dataset.tasks
        for sample in dataset.samples(length, task)
    }


def is_echo(prediction: str, sample: Sample) -> bool:
    """Whether a prediction contains the end of its prompt, which may hold or hint the answer.

    Looked for, whatever the white space: the last characters of the prompt, the beginning of the
    question and the answer prefix. Happens where a tool returns prompt and answer together, or cuts
    the prompt off by a number of characters.
    """
    text = " ".join(prediction.split())
    question = sample.prompt[sample.question_start :]
    pieces = (
        sample.prompt.rstrip()[-ECHO_CHARACTERS:],
        question.lstrip()[:ECHO_CHARACTERS],
        sample.answer_prefix,
    )
    normal = (" ".join(piece.split()) for piece in pieces)
    return any(len(piece) >= SHORTEST_ECHO and piece in text for piece in normal)


def _scored_row(row: Row, sample: Sample) -> Row:
    cell = str(row.get("cell") or row.get("method") or UNNAMED_CELL)
    failed = row.get("error") or ("no prediction" if row["prediction"] is None else None)
    return {
        "method": cell.partition(":")[0],
        "pass": 0,
        **row,
        "cell": cell,
        "task": sample.task,
        "context_length": sample.context_length,
        "metric": sample.metric,
        "num_references": len(sample.references),
        "groups": sample.groups,
        "score": None if failed else score(row["prediction"], sample),
        "error": failed,
    }


def _checked_rows(path: Path, samples: dict[str, Sample]) -> Iterator[Row]:
    """Rows with a known id, once per cell and pass. Raises UsageError naming the first other."""
    seen: set[tuple[str, str, int]] = set()
    for number, row in enumerate(read_rows(path, whole_groups=False), start=1):
        where = f"{path}:{number}"
        for field in ("id", "prediction"):
            if field not in row:
                raise UsageError(f"{where}: a prediction needs the field '{field}'.")
        for field, (kinds, name) in FIELD_TYPES.items():
            if not isinstance(row.get(field), kinds):
                raise UsageError(f"{where}: the field '{field}' must be {name} or null.")
        if not isinstance(row["id"], str):
            raise UsageError(f"{where}: the field 'id' must be a text.")
        if row["id"] not in samples:
            raise UsageError(
                f"{where}: the dataset has no sample '{row['id']}': give the --data that these "
                "predictions were made from."
            )
        scored = _scored_row(row, samples[row["id"]])
        key = (row["id"], scored["cell"], scored["pass"])
        if key in seen:
            raise UsageError(
                f"{where}: a second prediction for sample '{row['id']}' of '{key[1]}': "
                "keep one of them."
            )
        seen.add(key)
        yield scored


def _check_kind(path: Path) -> None:
    """Raise UsageError if the first row tells that the file holds something else."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), None)
    if first is None:
        return
    try:
        row = json.loads(first)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not row.keys() & {"id", "prediction"}:
        raise UsageError(
            f"'{path}' is not a file of predictions: its first line is no JSON object with 'id' "
            "and 'prediction'. Give a JSONL file that has one in each line."
        )


def rescore(predictions: Path, data: Path) -> Rescored:
    """Score a JSONL file whose rows have at least `id` and `prediction`.

    `cell`, `method`, `settings`, `pass` and the audit are respected where a row has them; a score
    that it has is replaced. Raises UsageError for a missing or empty file or one of another kind,
    an unknown or repeated id or a missing field, ShadowKVError for a later line that is no JSON;
    what is wrong with a row names file and line.
    """
    if not predictions.is_file():
        raise UsageError(f"There are no predictions '{predictions}': give a JSONL file.")
    _check_kind(predictions)
    samples = read_samples(Dataset.open(data))
    rows = list(_checked_rows(predictions, samples))
    if not rows:
        raise UsageError(f"'{predictions}' holds no predictions.")
    have: dict[str, set[str]] = {}
    for row in rows:
        have.setdefault(row["cell"], set()).add(row["id"])
    missing = {cell: len(samples) - len(ids) for cell, ids in have.items()}
    echoes = [
        r["id"] for r in rows if r["prediction"] and is_echo(r["prediction"], samples[r["id"]])
    ]
    return Rescored(rows, {c: n for c, n in missing.items() if n}, list(dict.fromkeys(echoes)))
