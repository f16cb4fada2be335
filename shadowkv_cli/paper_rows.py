"""The paper's Table 1 beside a run of one of its models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from shadowkv_cli.summary import FULL, ScoreRecord
from shadowkv_cli.tables import NOTHING, Table
from shadowkv_cli.tasks.package_data import read_yaml
from shadowkv_cli.tasks.ruler.manifest import SHADOWKV_SUITE

SUITES = ("ruler", SHADOWKV_SUITE)
METHODS = {FULL: "Full", "shadowkv": "ShadowKV"}
"""Our methods that the paper has, and its names of them."""
PAPER_SHARE = "1.5625%"
"""Its budget of 2,048 tokens at 128K, as a share."""


@dataclass(frozen=True)
class PaperRow:
    """One row of the table: scores (0 to 100) by task; empty where it gives the average alone."""

    model: str
    method: str
    average: float
    scores: dict[str, float]


@cache
def paper_table() -> dict[str, Any]:
    """paper_table1.yaml as it stands."""
    data: dict[str, Any] = read_yaml("ruler/paper_table1.yaml")
    return data


def paper_rows() -> list[PaperRow]:
    """All rows of the table, in its order."""
    tasks = paper_table()["tasks"]
    return [
        PaperRow(
            row["model"],
            row["method"],
            row["average"],
            {t: v for t, v in zip(tasks, row["scores"], strict=True) if v is not None},
        )
        for row in paper_table()["rows"]
    ]


def paper_model(name: str) -> str | None:
    """The paper's name of a model, from that of the hub or of a folder; None if it has none."""
    short = name.rstrip("/").split("/")[-1].lower()
    models = paper_table()["models"].items()
    return next((paper for paper, names in models if short in names), None)


def setting_differences(record: ScoreRecord) -> list[str]:
    """What of a cell's settings is not the paper's."""
    theirs, found = paper_table()["settings"], []
    same_budget = (PAPER_SHARE, str(theirs["sparse_budget"]))
    for name in ("sparse_budget", "rank", "chunk_size", "outlier_chunks", "local_chunks"):
        ours = record.settings.get(name)
        same = {"sparse_budget": same_budget, "outlier_chunks": ("auto",)}.get(name, ())
        if ours is not None and str(ours) not in (*same, str(theirs[name])):
            found.append(f"{name.replace('_', ' ')} {ours} for {theirs[name]}")
    if record.settings.get("landmarks_per_chunk", 1) != 1:
        found.append(f"{record.settings['landmarks_per_chunk']} landmarks per chunk for 1")
    for name in ("value_dtype", "landmark_dtype"):
        if record.settings.get(name, "model") not in ("model", "packed"):  # packed loses no bit
            found.append(f"{name.replace('_dtype', 's')} in {record.settings[name]}")
    return found


def _differences(suite: str, length: int, shown: Sequence[ScoreRecord]) -> list[str]:
    """What a reader must know before a score is held against the paper's."""
    theirs, found = paper_table()["settings"], []
    if suite != SHADOWKV_SUITE:
        found.append("RULER's prompts and metrics, not the authors' (--dialect shadowkv)")
    if length != theirs["context_length"]:
        found.append(f"{length} tokens for {theirs['context_length']}")
    counts = {record.n for record in shown}
    if counts != {theirs["samples"]}:
        most = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
        found.append(f"{most} samples a task for {theirs['samples']}")
    for cell in dict.fromkeys(record.cell for record in shown):
        own = next(record for record in shown if record.cell == cell)
        found += [f"{cell}: {what}" for what in setting_differences(own)]
    return found


def paper_comparison(
    suite: str, model: str, scores: Iterable[ScoreRecord]
) -> tuple[Table, list[dict[str, Any]]] | None:
    """The run's longest context beside the paper's rows, as a table and for JSON.

    None where the model or no method of the run is the paper's, or the data are not RULER.
    """
    name = paper_model(model)
    tasks = paper_table()["tasks"]
    own = [
        r
        for r in scores
        if r.task in tasks and r.method in METHODS and r.context_length and r.tested and r.score
    ]
    if suite not in SUITES or name is None or not own:
        return None
    length = max(r.context_length or 0 for r in own)
    own = [r for r in own if r.context_length == length]
    rows, plain = [], []
    for cell in dict.fromkeys(r.cell for r in own):
        ours = {r.task: r.score for r in own if r.cell == cell and r.score is not None}
        method = METHODS[next(r.method for r in own if r.cell == cell)]
        (paper,) = [p for p in paper_rows() if (p.model, p.method) == (name, method)]
        shown = {t: s.estimate for t, s in ours.items()}
        average, theirs = fmean(shown.values()), fmean(paper.scores[t] for t in shown)
        for label, values, mean in (
            (cell, shown, average),
            (f"  paper: {method}", paper.scores, theirs),
        ):
            cells = [f"{values[t]:.2f}" if t in values else NOTHING for t in tasks]
            rows.append([label, *cells, f"{mean:.2f}"])
        plain.append(
            {
                "cell": cell,
                "context_length": length,
                "scores": shown,
                "average": average,
                "paper_model": name,
                "paper_scores": paper.scores,
                "paper_average": theirs,
            }
        )
    notes = [f"Paper: {paper_table()['source']}, {name}. Averages are over the tasks of the run."]
    if different := _differences(suite, length, own):
        notes.append(f"Not the paper's settings: {'; '.join(different)}.")
        for entry in plain:
            entry["differences"] = different
    title = f"Beside the paper's Table 1, {length} tokens: score (0 to 100)"
    return Table(title, ["method", *tasks, "average"], rows, notes), plain
