"""Sweeps: every cell's accuracy from one prefill a sample, then every cell's throughput."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowkv_cli.benchmark import measure_throughput, measured_before, prompt_source
from shadowkv_cli.evaluate import check_ready, evaluate_loaded, open_run
from shadowkv_cli.run_config import SweepConfig

if TYPE_CHECKING:
    from shadowkv_cli.bench.cases import Case


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left behind."""

    path: Path
    missing_rows: int
    failed_measurements: int
    accuracy_s: float


def sweep(config: SweepConfig) -> SweepOutcome:
    """Run both phases, each continuing where it stopped.

    Raises:
        UsageError: a cell, the data and the model do not fit together.
    """
    evaluation = config.evaluation
    ready = check_ready(evaluation)
    cases: list[Case] = []
    prompts = None
    settings = config.throughput and config.throughput.for_model(ready.loaded.max_positions)
    if settings is not None:
        from shadowkv_cli.bench.cases import Room, make_cases
        from shadowkv_cli.bench.throughput import check_comparable

        ready.loaded.check(list(evaluation.specs), max(settings.context_lengths))
        before = measured_before(evaluation.output, evaluation.fresh)
        room = Room(ready.loaded.shape, ready.loaded.device)
        cases = make_cases(evaluation.specs, settings, room, before)
        if settings.state == "prompts":
            prompts = prompt_source(
                ready.dataset,
                evaluation.model,
                settings.context_lengths,
                ready.loaded.vocab_size,
            )
    with open_run(evaluation, "sweep", ready) as run:
        if settings is not None:
            check_comparable(list(run.read("throughput")), settings, ready.loaded)
        outcome = evaluate_loaded(evaluation, "sweep", ready, run)
        failed = 0
        if settings is not None:
            failed = measure_throughput(run, ready.loaded, cases, settings, prompts)
    return SweepOutcome(outcome.path, outcome.missing_rows, failed, outcome.seconds)
