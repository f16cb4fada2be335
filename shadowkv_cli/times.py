"""How long the samples of an evaluation took, and what memory they needed: one line a length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from shadowkv_cli.console import format_bytes
from shadowkv_cli.rowlog import Row
from shadowkv_cli.stats import Interval, median_interval
from shadowkv_cli.summary import group_by
from shadowkv_cli.tables import NOTHING, Table, format_interval, loud_first


@dataclass(frozen=True)
class Times:
    """Medians over the prefills of one context length.

    Attributes:
        prefills: how many there were; a sample may have had several.
        cells: rows that one prefill served, the most of any.
        prompt_tokens: of a prompt.
        prefill_s: seconds to the first token of the answer.
        step_ms: milliseconds of a decoding step of all rows together.
        tokens_per_s: of all rows together.
        peak_bytes: the largest of prefill and decoding, of any sample; None if not known.
        prefill_peak_bytes, prefill_allowed_bytes: the largest peak of a prefill on a GPU, and what
            it may take by the sizes of model and caches.
        backends: exact attention that was used.
        reused_share: of the prompts' tokens, what was taken over from other prompts.
    """

    context_length: int
    prefills: int
    cells: int
    prompt_tokens: float
    prefill_s: Interval
    step_ms: float | None
    tokens_per_s: float | None
    peak_bytes: int | None
    prefill_peak_bytes: int | None
    prefill_allowed_bytes: int | None
    backends: tuple[str, ...]
    reused_share: float


def times_of(rows: Iterable[Row]) -> list[Times]:
    """By context length; rows that failed or say nothing of times are left out."""
    timed = [r for r in rows if r.get("error") is None and r.get("prefill_s") is not None]
    lengths = group_by(timed, lambda r: r["context_length"])
    return [_of_length(length, lengths[length]) for length in sorted(lengths)]


def _of_length(length: int, rows: Sequence[Row]) -> Times:
    passes = list(group_by(rows, lambda r: (r["id"], r["pass"])).values())
    steps, speeds = [], []
    for own in passes:
        # Of several samples that are decoded together each has its share of the speed.
        longest = max(r["generated_tokens"] for r in own) - 1  # the first is the prefill's
        run, together = own[0].get("decode_steps", longest), own[0].get("samples_together", 1)
        decoded = sum(r["generated_tokens"] - 1 for r in own)
        if longest > 0 and own[0].get("decode_s"):
            steps.append(own[0]["decode_s"] / run * 1e3)
            speeds.append(decoded * together / own[0]["decode_s"])

    def most(name: str) -> int | None:
        return max((r[name] for r in rows if r.get(name)), default=None)

    return Times(
        context_length=length,
        prefills=len(passes),
        cells=max(map(len, passes)),
        prompt_tokens=median(own[0]["prompt_tokens"] for own in passes),
        prefill_s=median_interval([own[0]["prefill_s"] for own in passes]),
        step_ms=median(steps) if steps else None,
        tokens_per_s=median(speeds) if speeds else None,
        peak_bytes=most("peak_memory_bytes"),
        prefill_peak_bytes=most("prefill_peak_bytes"),
        prefill_allowed_bytes=most("prefill_allowed_bytes"),
        backends=tuple(dict.fromkeys(r.get("attention_backend") or NOTHING for r in rows)),
        reused_share=sum(own[0].get("reused_tokens", 0) for own in passes)
        / sum(own[0]["prompt_tokens"] for own in passes),
    )


def times_as_rows(found: Iterable[Times]) -> list[dict[str, Any]]:
    """For JSON: the interval as estimate and bounds."""
    return [
        vars(one)
        | {"prefill_s": [one.prefill_s.estimate, one.prefill_s.low, one.prefill_s.high]}
        | {"backends": list(one.backends)}
        for one in found
    ]


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _bytes(count: int | None) -> str:
    return NOTHING if count is None else format_bytes(count)


def times_table(found: Sequence[Times], more_notes: Sequence[str] = ()) -> Table:
    """One line a context length; `more_notes` of the run stand first."""
    rows = [
        [
            str(one.context_length),
            str(one.prefills),
            str(one.cells),
            _number(one.prompt_tokens, 0),
            format_interval(one.prefill_s, digits=2),
            _number(one.step_ms, 2),
            _number(one.tokens_per_s, 1),
            _bytes(one.peak_bytes),
            _bytes(one.prefill_peak_bytes),
            _bytes(one.prefill_allowed_bytes),
            ", ".join(one.backends),
        ]
        for one in found
    ]
    columns = ["context", "prefills", "cells", "prompt", "prefill s", "ms a step", "tokens/s"]
    columns += ["peak", "peak of prefill", "allowed", "attention"]
    used = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in rows)]
    notes = [
        *loud_first(more_notes),
        "Medians over the samples; all cells of a sample are decoded together, so steps and tokens "
        "are those of the whole batch, the capture of its CUDA graph included.",
    ]
    if any(one.prefill_allowed_bytes for one in found):
        notes.append(
            "allowed: weights, one layer's keys and values, what the cells keep, and a workspace "
            "of 6 tensors of the prompt's tokens by the model's width."
        )
    reused = {one.context_length: one.reused_share for one in found if one.reused_share}
    if reused:
        shares = ", ".join(f"{share:.0%} at {length}" for length, share in reused.items())
        notes.append(f"Of the prompts' tokens, prefills were spared those taken over: {shares}.")
    return Table(
        "Time and memory of the samples",
        [columns[i] for i in used],
        [[row[i] for i in used] for row in rows],
        notes,
    )
