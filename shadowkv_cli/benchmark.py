"""The runs of `shadowkv bench`, and the throughput phase of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv_cli.console import notice, progress
from shadowkv_cli.environment import capture
from shadowkv_cli.errors import UsageError
from shadowkv_cli.evaluate import RANDOM_NOTE, TOY_NOTE
from shadowkv_cli.results import RunFolder
from shadowkv_cli.run_config import BenchConfig, BenchSettings, ModelChoice
from shadowkv_cli.tasks.rows import Dataset

if TYPE_CHECKING:
    from shadowkv_cli.bench.throughput import Case
    from shadowkv_cli.model.loading import LoadedModel


def _prompt_texts(data: Path, context_length: int) -> list[str]:
    """Prompts of a length, the tasks taking turns."""
    dataset = Dataset.open(data)
    if context_length not in dataset.context_lengths:
        held = ", ".join(map(str, dataset.context_lengths))
        raise UsageError(f"{data} has no context length {context_length}; it has {held}.")
    by_task = [dataset.samples(context_length, task) for task in dataset.tasks]
    longest = max(map(len, by_task))
    return [task[i].text for i in range(longest) for task in by_task if i < len(task)]


def measure_throughput(
    run: RunFolder,
    loaded: LoadedModel,
    cases: Sequence[Case],
    settings: BenchSettings,
    model: ModelChoice,
    data: Path | None,
) -> int:
    """Measure what has no row yet and append it; returns the number of failed measurements."""
    from shadowkv_cli.bench.throughput import check_done, prompts_from, run_cases
    from shadowkv_cli.tasks.tokenization import load_tokenizer

    rows = [r for r in run.read("throughput") if r["state"] == settings.state]
    done = check_done(rows)
    finished = sum(done(case, n) for case in cases for n in range(settings.rounds))
    if finished:
        notice(f"{finished} of {len(cases) * settings.rounds} measurements are done; continuing.")
    prompts = None
    if settings.state == "prompts":
        assert data is not None
        tokenizer = load_tokenizer(
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            offline=model.offline,
        )
        prompts = prompts_from(tokenizer, lambda length: _prompt_texts(data, length))
    failed = 0
    with progress("throughput", len(cases) * settings.rounds) as bar:
        bar.skip(finished)
        for row in run_cases(cases, settings, loaded, done=done, prompts=prompts):
            run.append("throughput", [row])
            failed += row["error"] is not None
            speed = "failed" if row["error"] else f"{row['tokens_per_s']:.0f} tokens/s"
            bar.advance(detail=f"{row['cell']}, batch {row['batch_size']}, {speed}")
    return failed


def bench_identity(
    loaded: LoadedModel, model: ModelChoice, settings: BenchSettings
) -> dict[str, Any]:
    """What must be equal for measurements to be compared."""
    return {
        "model": model.name,
        "model_fingerprint": loaded.fingerprint,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "state": settings.state,
        "decode_steps": settings.decode_steps,
        "warmup_steps": settings.warmup_steps,
    }


def benchmark(config: BenchConfig) -> tuple[Path, int]:
    """Measure the decode throughput of every method; continues a run that was stopped.

    Returns the run's folder and the number of failed measurements.
    """
    from shadowkv_cli.bench.throughput import make_cases
    from shadowkv_cli.model.loading import load_model

    loaded = load_model(config.model)
    longest = max(config.settings.context_lengths) + config.settings.new_tokens
    loaded.check(list(config.specs), longest)
    cases = make_cases(config.specs, config.settings, loaded)
    notes = []
    if loaded.random_weights:
        notes.append(RANDOM_NOTE)
    elif loaded.name == "demo":
        notes.append(TOY_NOTE)
    with RunFolder.open(
        config.output,
        kind="bench",
        identity=bench_identity(loaded, config.model, config.settings),
        scope={
            "cells": [spec.cell for spec in config.specs],
            "context_lengths": list(config.settings.context_lengths),
            "batch_rules": list(config.settings.batch_rules),
            "rounds": config.settings.rounds,
        },
        environment=capture(str(loaded.device)),
        command=config.command,
        notes=notes,
        flags={"random_weights": loaded.random_weights, "toy_model": loaded.name == "demo"},
        fresh=config.fresh,
    ) as run:
        failed = measure_throughput(run, loaded, cases, config.settings, config.model, config.data)
    return config.output, failed
