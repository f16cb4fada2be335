"""What the figures are drawn from: the records of one or several runs, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shadowkv_cli.frontier import FrontierPoint, join_sweep
from shadowkv_cli.results import Run
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import (
    AVERAGE,
    ScoreRecord,
    ThroughputRecord,
    score_records,
    throughput_records,
)

FLAG_WARNINGS = {
    "random_weights": "Random weights: scores mean nothing.",
    "toy_model": "Toy model.",
    "synthetic": "Synthetic text: not comparable with published RULER.",
}
SHORT_NAMES = {
    "sparse_budget": "budget",
    "chunk_size": "chunk",
    "landmarks_per_chunk": "landmarks a chunk",
    "outlier_chunks": "outliers",
    "local_chunks": "local",
    "value_dtype": "values",
    "landmark_dtype": "landmarks",
}


@dataclass(frozen=True)
class Series:
    """One run: its name in the figures, its records and rows, and the probe of its device."""

    label: str
    scores: list[ScoreRecord]
    throughput: list[ThroughputRecord]
    predictions: list[Row]
    measurements: list[Row]
    probe: dict[str, Any]


@dataclass(frozen=True)
class Joined:
    """Cells with accuracy and throughput, of one run or of an eval and a bench of one model."""

    label: str
    points: list[FrontierPoint]
    random_weights: bool


@dataclass(frozen=True)
class PlotData:
    """Everything a figure may show.

    Attributes:
        warnings: sentences that every figure must carry (synthetic text, toy or random models).
    """

    series: list[Series]
    joined: list[Joined]
    warnings: list[str]

    @property
    def with_scores(self) -> list[Series]:
        return [s for s in self.series if s.scores]

    @property
    def with_throughput(self) -> list[Series]:
        return [s for s in self.series if s.throughput]

    def title(self, text: str, series: Series | Joined) -> str:
        """The text, with the run's name in front if there are several."""
        return f"{series.label}: {text}" if len(self.series) > 1 else text


def _warnings(runs: Sequence[Run]) -> list[str]:
    """Warnings of flags first, then the notes that say something else, each once."""
    found = [text for flag, text in FLAG_WARNINGS.items() if any(r.flag(flag) for r in runs)]
    known = [flag.partition("_")[0] for flag in FLAG_WARNINGS if any(r.flag(flag) for r in runs)]
    for note in (note for run in runs for note in run.notes):
        if not any(word in note.lower() for word in known):
            found.append(note[:1].upper() + note[1:].rstrip(".") + ".")
    return list(dict.fromkeys(found))


def _same_model(a: Run, b: Run) -> bool:
    """Whether two runs are of one model, as far as both say."""
    first, second = a.manifest["identity"], b.manifest["identity"]
    shared = {"model", "model_fingerprint"} & first.keys() & second.keys()
    return all(first[key] == second[key] for key in shared)


def load(runs: Sequence[Run]) -> PlotData:
    """Summarise runs and join accuracy to throughput, across runs only of the same model."""
    names = [run.name for run in runs]
    series = [
        Series(
            run.name if names.count(run.name) == 1 else str(run.path),
            score_records(run.predictions),
            throughput_records(run.throughput),
            run.predictions,
            run.throughput,
            (run.manifest.get("environment") or {}).get("probe") or {},
        )
        for run in runs
    ]
    joined = []
    for own, run in zip(series, runs, strict=True):
        for other, other_run in zip(series, runs, strict=True):
            alone = own is other or not (own.throughput or other.scores)
            if not alone or not _same_model(run, other_run):
                continue
            points = join_sweep(own.scores, other.throughput)
            if points:
                label = own.label if own is other else f"{own.label} + {other.label}"
                random = run.flag("random_weights") or other_run.flag("random_weights")
                joined.append(Joined(label, points, random))
    return PlotData(series, joined, _warnings(runs))


def pretty_cell(cell: str) -> str:
    """A cell's label as words: `shadowkv:rank=64` as `shadowkv, rank 64`."""
    method, _, settings = cell.partition(":")
    parts = [part.partition("=") for part in settings.split(",") if part]
    # No-break spaces: a name stays on one line with its value.
    return ", ".join([method, *(f"{SHORT_NAMES.get(k, k)}\u00a0{v}" for k, _, v in parts)])


def different_settings(cells: Sequence[str]) -> tuple[list[str], str]:
    """Cells as words without the settings that all cells of ShadowKV have, and these as words."""
    split = [cell.partition(" (") for cell in cells]
    settings = [name.partition(":")[2].split(",") for name, *_ in split]
    ours = [own for cell, own in zip(cells, settings, strict=True) if ":" in cell]
    common = [part for part in (ours[0] if ours else []) if all(part in own for own in ours)]
    words = []
    for (name, bracket, rest), own in zip(split, settings, strict=True):
        different = ",".join(part for part in own if part and part not in common)
        method = name.partition(":")[0]
        words.append(pretty_cell(f"{method}:{different}") + bracket + rest)
    return words, pretty_cell(":" + ",".join(common)).removeprefix(", ")


def representative_cells(records: Sequence[ScoreRecord], limit: int) -> list[str]:
    """All cells if they are few; else `limit` of them, evenly from best average to worst.

    Cells without an average, since a task failed altogether, count as the worst.
    """
    averages = {r.cell: r.score.estimate if r.score else -1 for r in records if r.task == AVERAGE}
    ranked = sorted(averages, key=lambda cell: -averages[cell])
    if len(ranked) <= limit:
        return list(averages)
    return [ranked[round(i * (len(ranked) - 1) / (limit - 1))] for i in range(limit)]


def setting(record: ScoreRecord | ThroughputRecord | FrontierPoint, name: str) -> Any:
    """One setting of a cell; the budget as tokens where it is a number, else as the share."""
    value = record.settings.get(name)
    return int(value) if isinstance(value, str) and value.isdigit() else value


def is_share(value: Any) -> bool:
    """Whether a setting is a share of the prompt, like `1.5625%`."""
    return str(value).endswith("%")


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Order of settings: numbers by size, words by name, then shares by size."""
    text = str(value)
    try:
        return is_share(value), float(text.rstrip("%")), text
    except ValueError:
        return is_share(value), float("inf"), text
