"""shadowkv bench --model demo --context-length 16k --method full,shadowkv"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from shadowkv_cli.console import notice
from shadowkv_cli.errors import EXIT_INCOMPLETE, UsageError
from shadowkv_cli.option_groups import (
    BatchSizeOption,
    MethodOptions,
    ModelOptions,
    OneAtATimeOption,
    RunOptions,
    TimingOptions,
    given_lengths,
    spread,
)
from shadowkv_cli.run_config import (
    BenchConfig,
    default_output,
    parse_graphs,
    parse_hit_rates,
    parse_parts,
)

DEFAULT_CONTEXT = 16 * 1024


@spread
def bench(
    *,
    model: ModelOptions,
    methods: MethodOptions,
    timing: TimingOptions,
    context_length: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LENGTH[,…]",
            help="Tokens of each prompt and its answer together; commas or repeats. [default: 16k]",
        ),
    ] = None,
    batch_size: BatchSizeOption = None,
    state: Annotated[
        Literal["auto", "synthetic", "tokens", "prompts"],
        typer.Option(
            help="Decode from random keys and values (synthetic), from a prefill of random tokens, "
            "or of prompts of --data; auto: prompts with --data, else tokens."
        ),
    ] = "auto",
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder that `build-data` wrote.")
    ] = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Cells of one length and batch read one copy of the prompts' data.",
        ),
    ] = False,
    hit_rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="measured|SHARE[,…]",
            help="Let the queries that select drift so slowly that this share of the chunks is at "
            "hand, like 0.88; its rows say that they were driven. [default: measured]",
        ),
    ] = None,
    lanes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[,…]",
            help="Parts of a micro-batch whose fetches from the host overlap with each other's "
            "work inside a layer; commas or repeats. [default: one for each sequence, at most 32; "
            "for every 2, at most 16, where the buffers differ in size; of several micro-batches "
            "one for each, at most 8; on a CPU 1]",
        ),
    ] = None,
    micro_batches: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[,…]",
            help="Parts of a batch that go through the layers one behind the other: one fetches "
            "from the host while another multiplies; commas or repeats. [default: 2 where a given "
            "--hit-rate makes that faster on this GPU, by its probe, and --lanes are not given]",
        ),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(
            metavar="on|off[,…]",
            help="Whether a step on a GPU is one CUDA graph; commas or repeats. [default: on]",
        ),
    ] = None,
    eager_baseline: Annotated[
        bool,
        typer.Option(
            "--eager-baseline",
            help="Also time full attention as it runs without this program: transformers' own "
            "forward with SDPA, op by op.",
        ),
    ] = False,
    one_at_a_time: OneAtATimeOption = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Run nothing: say where the bytes of each batch would lie, and on a GPU how long "
            "each phase of a step should take, by its probe.",
        ),
    ] = False,
    run: RunOptions,
) -> None:
    """Time the decoding of each method alone, in rounds that take turns over the methods.

    Prints prefill time, tokens/s with an interval, step times, memory and hit rate.

    Example: shadowkv bench --model demo --context-length 16k --batch-size 1,2
    """
    from shadowkv_cli.benchmark import benchmark
    from shadowkv_cli.reporting import report_run

    specs = methods.specs(star=one_at_a_time)
    if state == "auto":
        state = "prompts" if data else "tokens"
    if data is not None and state != "prompts":
        raise UsageError(f"--data has no effect with --state {state}: leave one of them out.")
    if state == "synthetic" and model.attention_backend != "auto":
        raise UsageError("--attention-backend has no effect with --state synthetic: no prefill.")
    lengths = given_lengths(context_length, "--context-length") or (DEFAULT_CONTEXT,)
    settings = replace(
        timing.settings(lengths, batch_size, state, model.attention_backend, share=share),
        hit_rates=parse_hit_rates(hit_rate),
        lanes=parse_parts(lanes, "lanes"),
        micro_batches=parse_parts(micro_batches, "micro-batches"),
        graphs=parse_graphs(graph),
        eager_baseline=eager_baseline,
        one_at_a_time=one_at_a_time,
    )
    choice = model.choice()
    identity = {"model": choice, "cells": [s.cell for s in specs], "how": settings, "data": data}
    config = BenchConfig(
        choice,
        tuple(specs),
        settings,
        run.output or default_output("bench", model.model, identity),
        data,
        run.fresh,
        run.command,
    )
    if plan and run.dry_run:
        raise UsageError("--plan and --dry-run both run nothing: leave one of them out.")
    if plan:
        from shadowkv_cli.dry_run import describe_batches

        describe_batches(config).show(as_json=run.json)
        return
    if run.dry_run:
        from shadowkv_cli.dry_run import describe_benchmark

        describe_benchmark(config).show(as_json=run.json)
        return
    path, failed = benchmark(config)
    report_run(path, as_json=run.json)
    notice(f"Rows and summary: {path}")
    if failed:
        notice(f"{failed} measurements failed; the same command tries them again.")
        raise typer.Exit(EXIT_INCOMPLETE)
