"""From the rows of runs to one record per cell: scores with intervals, and throughput.

A cell is one method with one setting. Rows in which a cell failed are left out and counted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from shadowkv_cli.rowlog import Row, write_atomic
from shadowkv_cli.stats import (
    Interval,
    macro_average,
    mean_interval,
    median_interval,
    paired_difference,
)

AVERAGE = "average"
FULL = "full"

COUNTING_METRICS = frozenset({"string_match_all", "shadowkv_multi_number", "shadowkv_multi_words"})
"""Metrics whose score is the share of a sample's references that were found."""


@dataclass(frozen=True)
class ScoreRecord:
    """Score of one cell on one task at one length, or averaged over them.

    Attributes:
        task: the task, or `average`: the unweighted mean over the tasks.
        context_length: tokens; None: the unweighted mean over all lengths and tasks.
        score: 0 to 100; None if every sample failed.
        difference: points to full attention, paired by sample within one prefill; None for full
            attention itself and where no pair exists.
        differing: predictions that are not the text that full attention gave, of the pairs.
        active_share: share of samples that the method answered (the others were shorter than what
            it keeps and answered with full attention); None for full attention.
        budget_tokens, outlier_tokens, attended_tokens, gpu_bytes, host_bytes, hit_rate: means over
            the samples; None where no row says.
    """

    cell: str
    method: str
    settings: dict[str, Any]
    context_length: int | None
    task: str
    score: Interval | None
    failed: int
    difference: Interval | None
    differing: int | None
    active_share: float | None
    budget_tokens: float | None
    outlier_tokens: float | None
    attended_tokens: float | None
    gpu_bytes: float | None
    host_bytes: float | None
    hit_rate: float | None

    @property
    def n(self) -> int:
        return self.score.n if self.score else 0

    @property
    def tested(self) -> bool:
        """False if full attention answered every sample, so that the score is not the method's."""
        return self.active_share is None or self.active_share > 0


@dataclass(frozen=True)
class ThroughputRecord:
    """Decode speed of one cell at one length and batch size.

    Attributes:
        tokens_per_s: median over the rounds, of all rows of the batch together; None if all failed.
        ratio: to full attention at the same length and batch rule, paired by round; `auto` (the
            method's own largest batch) is held against full attention's largest. None without it.
        step_ms_p50, step_ms_p99: of all decode steps of all rounds.
        peak_memory_bytes: the largest of the rounds.
        prefill_peak_bytes, prefill_allowed_bytes: the same of the prefills on a GPU, and what they
            may take by the sizes of model and caches.
        tested: False if the prompt is not longer than what the method keeps, so that it was decoded
            with full attention.
    """

    cell: str
    method: str
    settings: dict[str, Any]
    context_length: int
    batch_size: int
    batch_rule: str
    state: str
    device: str
    tokens_per_s: Interval | None
    failed: int
    ratio: Interval | None
    step_ms_p50: float | None
    step_ms_p99: float | None
    prefill_s: float | None
    budget_tokens: float | None
    gpu_bytes: float | None
    host_bytes: float | None
    peak_memory_bytes: float | None
    hit_rate: float | None
    predicted_step_ms: float | None
    prefill_peak_bytes: float | None = None
    prefill_allowed_bytes: float | None = None
    tested: bool = True


def group_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, both in the order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def _succeeded(row: Row) -> bool:
    return row.get("error") is None and row.get("score") is not None


def chosen_rows(rows: Iterable[Row]) -> tuple[list[tuple[Row, Row | None]], int]:
    """One row per sample of one cell's rows, each with its full-attention row, and the failures.

    The rows of `full` must be among them. A sample that was decoded in several prefills counts
    once: the first in which both succeeded, else the first in which the cell did.
    """
    rows = list(rows)
    full = {(r["id"], r.get("pass", 0)): r for r in rows if r["method"] == FULL and _succeeded(r)}
    chosen: list[tuple[Row, Row | None]] = []
    failed = 0
    samples = group_by((r for r in rows if r["method"] != FULL), lambda r: r["id"])
    for sample in (samples or group_by(rows, lambda r: r["id"])).values():
        good = sorted((r for r in sample if _succeeded(r)), key=lambda r: r.get("pass", 0))
        if not good:
            failed += 1
            continue
        pairs = [(r, full.get((r["id"], r.get("pass", 0)))) for r in good]
        chosen.append(next((p for p in pairs if p[1] is not None), pairs[0]))
    return chosen, failed


def parts_of_score(row: Row) -> int:
    """What a row's score is a share of: its references, where the metric counts those it finds.

    Elsewhere references are alternatives, of which the best one counts, or there is one.
    """
    return int(row.get("num_references") or 1) if row.get("metric") in COUNTING_METRICS else 1


def _difference(pairs: list[tuple[float, float]], references: float) -> Interval | None:
    if not pairs:
        return None
    method, full = zip(*pairs, strict=True)
    return paired_difference(method, full, num_references=references).scaled(100)


def _score_record(cell_rows: list[Row], full_rows: list[Row]) -> ScoreRecord:
    """Record of one cell on one task at one length."""
    first = cell_rows[0]
    is_full = first["method"] == FULL
    chosen, failed = chosen_rows(cell_rows if is_full else cell_rows + full_rows)
    rows = [row for row, _ in chosen]
    pairs = [] if is_full else [(r["score"], f["score"]) for r, f in chosen if f is not None]
    references = _mean(map(parts_of_score, rows)) or 1
    changed = sum(f is not None and r["prediction"] != f["prediction"] for r, f in chosen)

    def mean(name: str) -> float | None:
        return _mean(r.get(name) for r in rows)

    return ScoreRecord(
        cell=first["cell"],
        method=first["method"],
        settings=first.get("settings") or {},
        context_length=first["context_length"],
        task=first["task"],
        score=mean_interval([r["score"] for r in rows], num_references=references).scaled(100)
        if rows
        else None,
        failed=failed,
        difference=_difference(pairs, references),
        differing=changed if pairs else None,
        active_share=None if is_full else _mean(not r.get("dense_fallback", False) for r in rows),
        budget_tokens=mean("sparse_budget_tokens"),
        outlier_tokens=mean("outlier_tokens"),
        attended_tokens=_mean((r.get("audit") or {}).get("attended_tokens") for r in rows),
        gpu_bytes=mean("gpu_bytes"),
        host_bytes=mean("host_bytes"),
        hit_rate=mean("hit_rate"),
    )


def _average(records: list[ScoreRecord], context_length: int | None) -> ScoreRecord:
    """Unweighted mean of one cell's records; intervals by `stats.macro_average`.

    None where a record has none: over the others it would be a mean of other tasks than those of
    the cells beside it.
    """
    first = records[0]
    scores = [r.score for r in records if r.score]
    differences = [r.difference for r in records if r.difference]
    scored, paired = (len(found) == len(records) for found in (scores, differences))

    def mean(name: str) -> float | None:
        return _mean(getattr(r, name) for r in records)

    return ScoreRecord(
        cell=first.cell,
        method=first.method,
        settings=first.settings,
        context_length=context_length,
        task=AVERAGE,
        score=macro_average(scores) if scored else None,
        failed=sum(r.failed for r in records),
        difference=macro_average(differences) if paired else None,
        differing=sum(r.differing or 0 for r in records) if paired else None,
        active_share=mean("active_share"),
        budget_tokens=mean("budget_tokens"),
        outlier_tokens=mean("outlier_tokens"),
        attended_tokens=mean("attended_tokens"),
        gpu_bytes=mean("gpu_bytes"),
        host_bytes=mean("host_bytes"),
        hit_rate=mean("hit_rate"),
    )


def is_unscored(row: Row) -> bool:
    """Whether a row has times and memory alone: of a model whose weights were never trained."""
    return all(row.get(name) is None for name in ("error", "prediction", "score"))


def score_records(rows: Iterable[Row]) -> list[ScoreRecord]:
    """Scores of prediction rows: per cell, length and task, then the averages of each cell.

    Rows that have none because the model has random weights are left out.

    Per length an `average` over its tasks; with several lengths one more over everything, whose
    `context_length` is None. Full attention comes first, then the cells as they appear.
    """
    rows = [row for row in rows if not is_unscored(row)]
    groups = group_by(rows, lambda r: (r["context_length"], r["task"]))
    by_cell: dict[str, list[ScoreRecord]] = {}
    for key in sorted(groups, key=lambda k: k[0]):
        cells = group_by(groups[key], lambda r: r["cell"])
        full = [r for r in groups[key] if r["method"] == FULL]
        for cell, cell_rows in cells.items():
            by_cell.setdefault(cell, []).append(_score_record(cell_rows, full))
    records: list[ScoreRecord] = []
    for own in sorted(by_cell.values(), key=lambda r: r[0].method != FULL):
        lengths = list(dict.fromkeys(r.context_length for r in own))
        for length in lengths:
            here = [r for r in own if r.context_length == length]
            records += [*here, _average(here, length)]
        if len(lengths) > 1:
            records.append(_average(own, None))
    return records


def _throughput_record(rows: list[Row], full: list[Row]) -> ThroughputRecord:
    first = rows[0]
    good = [r for r in rows if r.get("error") is None and r.get("tokens_per_s") is not None]
    reference = {r["round"]: r["tokens_per_s"] for r in full if r.get("tokens_per_s")}
    ratios = [r["tokens_per_s"] / reference[r["round"]] for r in good if r["round"] in reference]
    steps = [ms for r in good for ms in r.get("step_ms") or []]
    prefills = [r["prefill_s"] for r in good if r.get("prefill_s") is not None]
    tested = not first.get("dense_fallback", False)

    def mean(name: str) -> float | None:
        return _mean(r.get(name) for r in good)

    def most(name: str) -> float | None:
        return max((r.get(name) or 0 for r in good), default=0) or None

    return ThroughputRecord(
        cell=first["cell"],
        method=first["method"],
        settings=first.get("settings") or {},
        context_length=first["context_length"],
        batch_size=first["batch_size"],
        batch_rule=first["batch_rule"],
        state=first["state"],
        device=first["device"],
        tokens_per_s=median_interval([r["tokens_per_s"] for r in good]) if good else None,
        failed=len(rows) - len(good),
        ratio=median_interval(ratios) if ratios and first["method"] != FULL and tested else None,
        step_ms_p50=float(np.percentile(steps, 50)) if steps else mean("step_ms_p50"),
        step_ms_p99=float(np.percentile(steps, 99)) if steps else mean("step_ms_p99"),
        prefill_s=median(prefills) if prefills else None,
        budget_tokens=mean("sparse_budget_tokens"),
        gpu_bytes=mean("gpu_bytes"),
        host_bytes=mean("host_bytes"),
        peak_memory_bytes=most("peak_memory_bytes"),
        hit_rate=mean("hit_rate") if tested else None,
        predicted_step_ms=mean("predicted_step_ms"),
        prefill_peak_bytes=most("prefill_peak_bytes"),
        prefill_allowed_bytes=most("prefill_allowed_bytes"),
        tested=tested,
    )


def throughput_records(rows: Iterable[Row]) -> list[ThroughputRecord]:
    """Throughput per cell, length, batch rule and batch size, over the rounds."""
    groups = group_by(
        rows, lambda r: (r["cell"], r["context_length"], r["batch_rule"], r["batch_size"])
    )
    full: dict[tuple[Any, ...], list[Row]] = {}
    for (_, length, rule, size), own in groups.items():
        if own[0]["method"] == FULL:
            full |= {(length, rule): own, (length, rule, size): own}
    records = []
    for (_, length, rule, size), own in groups.items():
        keys = [(length, rule, size), (length, rule)]
        keys += [(length, "equal")] if rule == "auto" else []
        records.append(_throughput_record(own, next((full[k] for k in keys if k in full), [])))
    return records


def _flat(record: ScoreRecord | ThroughputRecord) -> Row:
    """A record as one level of columns: intervals as value, low and high; settings by name."""
    flat: Row = {"phase": "accuracy" if isinstance(record, ScoreRecord) else "throughput"}
    for name, value in vars(record).items():
        if name == "settings":
            flat |= {f"setting_{key}": item for key, item in value.items()}
        elif isinstance(value, Interval):
            flat |= {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
            flat.setdefault("n", value.n)
        else:
            flat[name] = value
    return flat


def records_as_rows(records: Iterable[ScoreRecord | ThroughputRecord]) -> list[Row]:
    """Records as flat dicts, for JSON and CSV."""
    return [_flat(record) for record in records]


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV with the union of their columns; None is empty, floats keep 10 digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row.get(column) for column in columns]
        writer.writerow([f"{v:.10g}" if isinstance(v, float) else v for v in values])
    return file.getvalue()


def write_summary_csv(
    path: Path,
    scores: Sequence[ScoreRecord],
    throughput: Sequence[ThroughputRecord] = (),
    more: Sequence[Row] = (),
) -> None:
    """Write all records into one flat table; the column `phase` tells them apart.

    `more` are rows of other phases behind them.
    """
    write_atomic(path, csv_text([*records_as_rows([*scores, *throughput]), *more]))
