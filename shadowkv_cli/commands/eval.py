"""shadowkv eval --model demo --data datasets/demo --method full --method shadowkv"""

from __future__ import annotations

import typer

from shadowkv_cli.console import format_duration, notice
from shadowkv_cli.errors import EXIT_INCOMPLETE
from shadowkv_cli.option_groups import (
    AnswerOptions,
    MethodOptions,
    ModelOptions,
    RunOptions,
    eval_config,
    spread,
)


@spread
def eval_command(
    model: ModelOptions, data: AnswerOptions, methods: MethodOptions, run: RunOptions
) -> None:
    """Score methods on a dataset: every sample is prefilled once, all methods decode it together.

    A run that was stopped continues with the same command. Exit code 3 if some cells failed.

    Example: shadowkv eval --model demo --data datasets/demo --method full,shadowkv --rank 64
    """
    from shadowkv_cli.evaluate import evaluate
    from shadowkv_cli.reporting import report_run

    config = eval_config("eval", model, data, methods.specs(), run)
    if run.dry_run:
        from shadowkv_cli.dry_run import describe_evaluation

        describe_evaluation(config).show(as_json=run.json)
        return
    outcome = evaluate(config)
    report_run(outcome.path, as_json=run.json)
    notice(f"{outcome.path}: {format_duration(outcome.seconds)}.")
    if outcome.missing_rows:
        notice(f"{outcome.missing_rows} cells failed on a sample; the same command tries again.")
        raise typer.Exit(EXIT_INCOMPLETE)
