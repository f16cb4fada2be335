"""Sweeps: every cell's accuracy from one prefill a sample, then every cell's throughput."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowkv_cli.benchmark import measure_throughput
from shadowkv_cli.evaluate import check_ready, evaluate_loaded, open_run
from shadowkv_cli.run_config import SweepConfig

if TYPE_CHECKING:
    from shadowkv_cli.bench.throughput import Case


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
    if config.throughput is not None:
        from shadowkv_cli.bench.throughput import make_cases

        longest = max(config.throughput.context_lengths) + config.throughput.new_tokens
        ready.loaded.check(list(evaluation.specs), longest)
        cases = make_cases(evaluation.specs, config.throughput, ready.loaded)
    with open_run(evaluation, "sweep", ready) as run:
        outcome = evaluate_loaded(evaluation, "sweep", ready, run)
        failed = 0
        if config.throughput is not None:
            failed = measure_throughput(
                run,
                ready.loaded,
                cases,
                config.throughput,
                evaluation.model,
                evaluation.data,
            )
    return SweepOutcome(outcome.path, outcome.missing_rows, failed, outcome.seconds)
