"""Decode throughput: every cell alone with its batch, in rounds that take turns over the cells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from shadowkv_cli.bench.cases import Case, free_bytes
from shadowkv_cli.bench.measure import Drifts, measure
from shadowkv_cli.bench.memory import (
    PeakMemory,
    allowed_bytes,
    free_host_bytes,
    release_memory,
)
from shadowkv_cli.bench.probes import device_name
from shadowkv_cli.bench.state import fill_prompts, fill_synthetic, random_prompts
from shadowkv_cli.config import CacheBytes, MethodSpec, SparseSpec
from shadowkv_cli.errors import UsageError
from shadowkv_cli.methods.pinned import idle_bytes
from shadowkv_cli.model.failures import MethodFailure, is_out_of_memory, who_packs
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops.packed import CannotPack
from shadowkv_cli.run_config import BenchSettings
from shadowkv_cli.shared_bytes import shared_cache_bytes

Row = dict[str, Any]
T = TypeVar("T")


def _needed_bytes(
    specs: Sequence[MethodSpec], case: Case, loaded: LoadedModel, settings: BenchSettings
) -> CacheBytes:
    """What the sessions of all cells hold at once."""
    shape, tokens, new = loaded.shape, case.prompt_tokens, settings.new_tokens
    if settings.share:
        held = [shared_cache_bytes(specs, shape, tokens, new, merge_cells=False)]
    else:
        held = [spec.cache_bytes(shape, tokens, new) for spec in specs]
    device, host = (sum(getattr(h, name) for h in held) for name in ("device", "host"))
    return CacheBytes(device * case.batch_size, host * case.batch_size)


def _all_fit(
    specs: Sequence[MethodSpec], case: Case, loaded: LoadedModel, settings: BenchSettings
) -> bool:
    needed = _needed_bytes(specs, case, loaded, settings)
    free = free_bytes(loaded.device, settings, loaded.shape, case.prompt_tokens)
    if loaded.device.type == "cpu":
        return needed.device + needed.host <= free
    return needed.device <= free and needed.host <= free_host_bytes() + idle_bytes()


class _Bench:
    """The sessions of the cases of one length and batch size, built when they are needed."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: BenchSettings,
        cases: list[Case],
        prompts: Callable[[int, int], list[list[int]]] | None,
    ) -> None:
        self.loaded, self.settings, self.cases = loaded, settings, cases
        self.prompts = prompts
        specs = list(dict.fromkeys(case.spec for case in cases))
        self.sets = [specs] if settings.share else [[spec] for spec in specs]
        self.all_fit = _all_fit(specs, cases[0], loaded, settings)
        if settings.share and not self.all_fit:
            self.sets = [[spec] for spec in specs]
        self._kept: dict[int, tuple[Session, torch.Tensor, float | None]] = {}
        self.drifts: Drifts = {}
        self.prefill_bytes: dict[tuple[MethodSpec, ...], Row] = {}
        """On a GPU: the peak of a set's prefills, and what these may take."""
        self.given_up: dict[MethodSpec, Row] = {}
        """What keeps others of its set from being measured, and why."""

    def divide(self, place: int, failure: Exception) -> list[int]:
        """Change a set that could not be built; which sets hold those that may fare better now.

        Without cells that cannot be packed the others can be measured, and where the memory does
        not hold all it may hold one.
        """
        here = self.sets[place]
        cause = failure if isinstance(failure, CannotPack) else failure.__cause__
        if isinstance(cause, CannotPack):
            at_fault = who_packs(here, cause.part)
            others = [spec for spec in here if spec not in at_fault]
            if not (at_fault and others):
                return []
            self.given_up |= {spec: _failure(failure) for spec in at_fault}
            self.sets[place] = others
            return [place]
        if len(here) == 1 or not is_out_of_memory(failure):
            return []
        self.all_fit = False
        self._kept.clear()
        first = len(self.sets)
        self.sets[place] = here[:1]
        self.sets += [[spec] for spec in here[1:]]
        return [place, *range(first, len(self.sets))]

    @contextmanager
    def session(self, place: int) -> Iterator[tuple[Session, torch.Tensor, float | None]]:
        """A filled session of a set: kept for the next round if all sets fit together."""
        if place in self._kept:
            yield self._kept[place]
            return
        built = self._build(self.sets[place])
        if self.all_fit:
            self._kept[place] = built
        yield built

    def peak_alone(self, place: int, peak_bytes: int) -> int | None:
        """Of a measured peak, what one cell has to do with it; None where that cannot be told.

        Sessions that wait for their next round are taken off. Cells that share one session hold
        each other's data.
        """
        if len(self.sets[place]) > 1 or not peak_bytes:
            return None
        others = [spec for i in self._kept if i != place for spec in self.sets[i]]
        held = _needed_bytes(others, self.cases[0], self.loaded, self.settings)
        on_cpu = self.loaded.device.type == "cpu"
        return max(peak_bytes - held.device - (held.host if on_cpu else 0), 0)

    def _build(self, specs: list[MethodSpec]) -> tuple[Session, torch.Tensor, float | None]:
        case, settings = self.cases[0], self.settings
        tokens, batch = case.prompt_tokens, case.batch_size
        prompts: list[list[int]] = []
        if settings.state == "tokens":
            prompts = random_prompts(batch, tokens, self.loaded.vocab_size)
        elif settings.state == "prompts":
            assert self.prompts is not None, "prompts come with the state 'prompts'"
            prompts = self.prompts(case.context_length, batch)
            self.loaded.check([], max(map(len, prompts)) + settings.new_tokens)
        release_memory()  # of the session before, if that is not kept
        session = Session(
            self.loaded,
            specs,
            prompt_tokens=max(map(len, prompts), default=tokens),
            new_tokens=settings.new_tokens,
            num_prompts=batch,
            backend=settings.backend,
            merge_cells=False,
        )
        if settings.state == "synthetic":
            return session, fill_synthetic(session, tokens), None
        peak = PeakMemory(self.loaded.device)
        peak.restart()
        filled = fill_prompts(session, prompts)
        if self.loaded.device.type == "cuda":
            allowed = allowed_bytes(self.loaded, session.store.prompt_tokens, session.held_bytes)
            self.prefill_bytes[tuple(specs)] = {
                "prefill_peak_bytes": peak.read(),
                "prefill_allowed_bytes": allowed.total,
            }
        return session, *filled


def describe_case(case: Case, settings: BenchSettings, loaded: LoadedModel) -> Row:
    """What is known of a measurement before it is made."""
    spec, batch = case.spec, case.batch_size
    held = spec.cache_bytes(loaded.shape, case.prompt_tokens, settings.new_tokens)
    kept = spec.keeps(case.prompt_tokens) if isinstance(spec, SparseSpec) else None
    return {
        "cell": case.cell,
        "spec": case.asked_spec.cell,
        "driven_hit_rate": case.hit_rate,
        "method": case.method,
        "settings": case.asked_spec.settings(),
        "resident_layers": case.resident_layers,
        "sparse_budget_tokens": kept.selected_tokens if kept else None,
        "outlier_tokens": kept.outlier_tokens if kept else None,
        "dense_fallback": isinstance(spec, SparseSpec) and spec.is_dense(case.prompt_tokens),
        "context_length": case.context_length,
        "prompt_tokens": case.prompt_tokens,
        "batch_size": batch,
        "batch_rule": case.batch_rule,
        "state": settings.state,
        "decode_steps": settings.decode_steps,
        "warmup_steps": settings.warmup_steps,
        "gpu_bytes": held.device * batch,
        "host_bytes": held.host * batch,
        "device": str(loaded.device),
        "hardware": device_name(loaded.device),
        "dtype": loaded.dtype_name,
    }


def run_cases(
    cases: Sequence[Case],
    settings: BenchSettings,
    loaded: LoadedModel,
    *,
    done: Callable[[Case, int], bool],
    prompts: Callable[[int, int], list[list[int]]] | None = None,
) -> Iterator[Row]:
    """Measure every case in every round that is not done; yields one row a measurement.

    Args:
        done: whether a case's round has a row already.
        prompts: makes prompts of (tokens, count), for the state `prompts`.
    """
    together: dict[tuple[int, int], list[Case]] = {}
    for case in cases:
        together.setdefault((case.context_length, case.batch_size), []).append(case)
    for of_size in together.values():
        yield from _measure_size(of_size, settings, loaded, done, prompts)


def _measure_size(
    cases: list[Case],
    settings: BenchSettings,
    loaded: LoadedModel,
    done: Callable[[Case, int], bool],
    prompts: Callable[[int, int], list[list[int]]] | None,
) -> Iterator[Row]:
    """All rounds of the cases of one length and batch; nothing of them is held afterwards."""
    release_memory()  # of the cases before
    bench, peak = _Bench(loaded, settings, cases, prompts), PeakMemory(loaded.device)
    for number in range(settings.rounds):
        # Every round begins with another cell, so that none is always first.
        for place in _rotated(range(len(bench.sets)), number):
            wanted = [c for c in cases if c.spec in bench.sets[place]]
            open_cases = [c for c in _rotated(wanted, number) if not done(c, number)]
            yield from _measure_set(bench, place, open_cases, number, peak)
        for case in cases:
            if case.spec in bench.given_up and not done(case, number):
                known = describe_case(case, settings, loaded)
                yield known | {"round": number} | bench.given_up[case.spec]


def _rotated(items: Sequence[T], by: int) -> list[T]:
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def _measure_set(
    bench: _Bench, place: int, cases: Sequence[Case], number: int, peak: PeakMemory
) -> Iterator[Row]:
    """Measure the cases of one session in one round; what fails becomes a row with its error."""
    if not cases:
        return
    known = [describe_case(c, bench.settings, bench.loaded) | {"round": number} for c in cases]
    again: list[int] = []
    try:
        with bench.session(place) as (session, first, prefill_s):
            for case, row in zip(cases, known, strict=True):
                peak.restart()
                try:
                    row |= measure(session, first, case, bench.settings, bench.drifts, number)
                except (MethodFailure, torch.OutOfMemoryError) as failure:
                    row |= _failure(failure)
                # A shared prefill does the work of every cell.
                row |= {
                    "prefill_s": prefill_s if len(bench.sets[place]) == 1 else None,
                    "peak_memory_bytes": bench.peak_alone(place, peak.read()),
                    "attention_backend": session.backend or None,
                    **bench.prefill_bytes.get(tuple(bench.sets[place]), {}),
                }
                yield row
    except (MethodFailure, CannotPack, torch.OutOfMemoryError, MemoryError) as failure:
        again = bench.divide(place, failure)
        if not again:
            for row in known:
                if "error" not in row:
                    yield row | _failure(failure)
    # The failure is gone, and with it the session that was being built.
    left = [c for c, row in zip(cases, known, strict=True) if "error" not in row]
    for where in again:
        yield from _measure_set(
            bench, where, [c for c in left if c.spec in bench.sets[where]], number, peak
        )


def _failure(error: BaseException) -> Row:
    return {"tokens_per_s": None, "error": " ".join(str(error).split()) or type(error).__name__}


def _same_threads(there: str, now: str) -> str:
    """The way out where a processor differs by its threads alone (`device_name`), else nothing."""
    before, after = (re.fullmatch(r"(.+), (\d+) threads", name) for name in (there, now))
    if before is None or after is None or before[1] != after[1] or before[2] == after[2]:
        return ""
    return f"run it with OMP_NUM_THREADS={before[2]}, "


def check_comparable(rows: Sequence[Row], settings: BenchSettings, loaded: LoadedModel) -> None:
    """Refuse to add to measurements that were made in another way, or on another device.

    Raises UsageError that says what differs.
    """
    now = {
        "state": settings.state,
        "decode_steps": settings.decode_steps,
        "warmup_steps": settings.warmup_steps,
        "hardware": device_name(loaded.device),
        "dtype": loaded.dtype_name,
    }
    for row in rows:
        differs = [f"{k} {row.get(k)} there, {v} now" for k, v in now.items() if row.get(k) != v]
        if differs:
            same = _same_threads(str(row.get("hardware")), str(now["hardware"]))
            raise UsageError(
                f"The run holds throughput measured differently ({'; '.join(differs)}): "
                f"{same if len(differs) == 1 else ''}choose another --output, or --fresh to start "
                "over."
            )


def check_done(rows: Sequence[Row]) -> Callable[[Case, int], bool]:
    """Look up measurements that exist and did not fail."""
    have = {
        (r["cell"], r["context_length"], r["batch_size"], r["batch_rule"], r["round"])
        for r in rows
        if r["error"] is None
    }
    return lambda case, number: (
        (
            case.cell,
            case.context_length,
            case.batch_size,
            case.batch_rule,
            number,
        )
        in have
    )
