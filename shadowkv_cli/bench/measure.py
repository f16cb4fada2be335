"""Measure one cell alone: its steps, one by one, and what stands beside them in its row."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shadowkv_cli.bench import eager, plan, probes, timeline
from shadowkv_cli.bench.cases import Case
from shadowkv_cli.bench.driven_hits import drive
from shadowkv_cli.bench.probes import device_name
from shadowkv_cli.config import MethodSpec
from shadowkv_cli.environment import clocks_mhz
from shadowkv_cli.model.failures import MethodFailure
from shadowkv_cli.model.session import Session
from shadowkv_cli.run_config import ANY_KERNEL, BenchSettings

Row = dict[str, Any]

Drifts = dict[tuple[MethodSpec, float], float]
"""How fast queries drift that drive a cell to a hit rate: found when it is first measured."""


class _StepClock:
    """Times between marks: on a GPU by its own events, so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def step_ms(self) -> list[float]:
        pairs = itertools.pairwise(self._marks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]


def measure(
    session: Session,
    first: torch.Tensor,
    case: Case,
    settings: BenchSettings,
    drifts: Drifts,
    number: int,
) -> Row:
    """Decode one cell alone, greedily, and time each step; the first round looks at phases too.

    Args:
        session: filled; it decodes this cell alone afterwards.
        first: int64 [P], the tokens to begin with.
        case: what is measured, and how.
        settings: steps and warm-up.
        drifts: found before; what is found now is added.
        number: of the round, from 0.

    Raises:
        MethodFailure: something failed, or logits are not finite.
    """
    before = clocks_mhz(session.loaded.device)
    work = _eagerly if case.eager else _in_the_engine
    row = work(session, first, case, settings, drifts, number)
    return row | {"clocks_mhz": [before, clocks_mhz(session.loaded.device)], "error": None}


def _speed(case: Case, step_ms: Sequence[float]) -> Row:
    return {
        "tokens_per_s": case.batch_size * len(step_ms) / sum(step_ms) * 1e3,
        "step_ms_p50": float(np.percentile(step_ms, 50)),
        "step_ms_p99": float(np.percentile(step_ms, 99)),
        "step_ms": [round(ms, 4) for ms in step_ms],
    }


def _eagerly(
    session: Session,
    first: torch.Tensor,
    case: Case,
    settings: BenchSettings,
    drifts: Drifts,
    number: int,
) -> Row:
    clock = _StepClock(session.loaded.device)

    def mark(step: int) -> None:
        if step >= settings.warmup_steps:
            clock.mark()

    _, finite = eager.decode(session, first, settings.new_tokens, before_step=mark)
    step_ms = clock.step_ms()
    if not bool(finite.all()):
        raise MethodFailure([case.spec], "the logits are not finite")
    return _speed(case, step_ms) | {
        "captured": False,
        "lanes": 1,
        "micro_batches": 1,
        "hit_rate": None,
        "attended_tokens": case.prompt_tokens + settings.new_tokens,
        "phase_ms": None,
        "phase_rule": None,
        "phase_bytes": None,
        "predicted_step_ms": None,
        "note": eager.NOTE,
    }


def _in_the_engine(
    session: Session,
    first: torch.Tensor,
    case: Case,
    settings: BenchSettings,
    drifts: Drifts,
    number: int,
) -> Row:
    session.focus(
        case.spec, lanes=case.lanes, captures=case.graph, micro_batches=case.micro_batches
    )
    if case.hit_rate is not None:
        known, steps = (case.spec, case.hit_rate), (settings.warmup_steps, settings.decode_steps)
        drifts[known] = drive(session, first, case.hit_rate, *steps, drifts.get(known))
        session.reset()
    tokens, clock = first, _StepClock(session.loaded.device)
    finite = torch.ones(case.batch_size, dtype=torch.bool, device=first.device)
    with session.attached():
        for step in range(settings.new_tokens):
            if step == settings.warmup_steps:
                clock.mark()
            stepped = session.next_tokens(tokens)
            tokens = stepped.tokens
            finite &= stepped.finite
            if step >= settings.warmup_steps:
                clock.mark()
    step_ms = clock.step_ms()
    session.check_finite(finite)
    audits = [session.audit(row, settings.new_tokens) for row in range(case.batch_size)]
    hits = session.hit_rate(max(settings.warmup_steps, 1) + 1, settings.new_tokens)
    phases = _phases(session, first, settings) if number == 0 else None
    return _speed(case, step_ms) | {
        "captured": session.is_captured,
        "lanes": case.lanes,
        "micro_batches": case.micro_batches,
        "hit_rate": hits,
        "attended_tokens": sum(a["attended_tokens"] for a in audits) / len(audits),
        "phase_ms": phases,
        "phase_rule": ANY_KERNEL if phases else None,
        "phase_bytes": _phase_bytes(session, case, hits) if phases else None,
        "predicted_step_ms": _predicted(session, case, hits),
        "note": None,
    }


def _phase_bytes(session: Session, case: Case, hits: float | None) -> dict[str, float]:
    """What each phase of a step must move at the hit rate that was measured."""
    return plan.phase_bytes(
        case.spec,
        session.loaded.shape,
        session.loaded.weight_bytes,
        case.prompt_tokens,
        case.batch_size,
        hit_rate=hits or 0.0,
        micro_batches=case.micro_batches,
    )


def _predicted(session: Session, case: Case, hits: float | None) -> float | None:
    """What the planner says of this batch at the hit rate that was measured; of a GPU alone."""
    loaded = session.loaded
    probe = probes.stored(device_name(loaded.device))
    if not session.is_captured or probe is None:
        return None
    found = plan.phase_ms(
        case.spec,
        loaded.shape,
        session.loaded.weight_bytes,
        probe,
        case.prompt_tokens,
        case.batch_size,
        hit_rate=hits or 0.0,
        lanes=case.lanes,
        micro_batches=case.micro_batches,
    )
    return round(found["step"], 3)


def _phases(
    session: Session, first: torch.Tensor, settings: BenchSettings
) -> dict[str, float] | None:
    """A captured step by phase, where the steps leave room to look at some."""
    warmup = settings.new_tokens - timeline.STEPS
    if not session.is_captured or warmup < 0:
        return None
    return timeline.phase_ms(session, first, warmup)
