"""shadowkv sweep --model demo --data datasets/demo --sparse-budget 64,128 --rank 16,32"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shadowkv_cli.config import FullSpec
from shadowkv_cli.console import format_duration, notice
from shadowkv_cli.errors import EXIT_INCOMPLETE, UsageError
from shadowkv_cli.option_groups import (
    AnswerOptions,
    BatchSizeOption,
    MethodOptions,
    ModelOptions,
    OneAtATimeOption,
    RunOptions,
    TimingOptions,
    eval_config,
    given_lengths,
    spread,
)
from shadowkv_cli.run_config import SweepConfig


@spread
def sweep(
    *,
    model: ModelOptions,
    data: AnswerOptions,
    methods: MethodOptions,
    timing: TimingOptions,
    one_at_a_time: OneAtATimeOption = False,
    no_throughput: Annotated[
        bool, typer.Option("--no-throughput", help="Measure accuracy only.")
    ] = False,
    bench_context_length: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LENGTH[,…]",
            help="Tokens of prompt and answer that decoding is timed on; commas or repeats. "
            "[default: 32k, or the model's context]",
        ),
    ] = None,
    bench_batch_size: BatchSizeOption = None,
    state: Annotated[
        Literal["synthetic", "prompts"],
        typer.Option(help="Time from random keys and values, or from prompts of the data."),
    ] = "synthetic",
    run: RunOptions,
) -> None:
    """Measure accuracy and throughput of every combination of the settings given as lists.

    With --one-at-a-time, one list varies while the others stay at their first value.

    All cells decode a sample together after one prefill; then each is timed alone. Full attention
    is always among them. A sweep that was stopped continues with the same command.

    Example: shadowkv sweep --model demo --data datasets/demo --sparse-budget 64,128 --rank 16,32
    """
    from shadowkv_cli.reporting import report_run
    from shadowkv_cli.sweep import sweep as run_sweep

    specs = methods.specs(star=one_at_a_time)
    if FullSpec() not in specs:
        specs.insert(0, FullSpec())
    settings = None
    if no_throughput:
        asked = (bench_context_length, bench_batch_size, timing, state)
        if asked != (None, None, TimingOptions(), "synthetic"):
            raise UsageError(
                "--no-throughput leaves the timing out, so --bench-context-length, "
                "--bench-batch-size, --decode-steps, --warmup-steps, --rounds and --state have no "
                "effect beside it."
            )
    else:
        settings = timing.settings(
            given_lengths(bench_context_length, "--bench-context-length"),
            bench_batch_size,
            state,
            model.attention_backend,
            share=True,
        )
    config = SweepConfig(eval_config("sweep", model, data, specs, run), settings)
    if run.dry_run:
        from shadowkv_cli.dry_run import describe_sweep

        describe_sweep(config).show(as_json=run.json)
        return
    outcome = run_sweep(config)
    report_run(outcome.path, as_json=run.json)
    notice(f"{outcome.path}: accuracy {format_duration(outcome.accuracy_s)}.")
    notice(f"Next: shadowkv plot {outcome.path}")
    if outcome.missing_rows or outcome.failed_measurements:
        notice(
            f"{outcome.missing_rows} cells failed on a sample, {outcome.failed_measurements} "
            "measurements failed; the same command tries them again."
        )
        raise typer.Exit(EXIT_INCOMPLETE)
