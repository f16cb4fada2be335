"""The runs of `shadowkv bench`, and the throughput phase of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv_cli.answering import reader_of, tokenizer_of
from shadowkv_cli.console import notice, progress
from shadowkv_cli.errors import UsageError
from shadowkv_cli.evaluate import (
    check_tokenizer,
    check_vocabulary,
    data_notes,
    environment_of,
    low_rank_facts,
    model_notes,
)
from shadowkv_cli.results import MANIFEST, RunFolder, check_place, read_run
from shadowkv_cli.rowlog import Row
from shadowkv_cli.run_config import BenchConfig, BenchSettings, ModelChoice
from shadowkv_cli.tasks.rows import Dataset

if TYPE_CHECKING:
    from shadowkv_cli.bench.cases import Case
    from shadowkv_cli.model.loading import LoadedModel


def prompt_source(
    dataset: Dataset, choice: ModelChoice, context_lengths: Sequence[int], vocab_size: int
) -> Callable[[int, int], list[list[int]]]:
    """Make the prompts of a benchmark, (context length, count) -> ids, the tasks taking turns.

    Raises:
        UsageError: the data were fitted with another tokenizer, or with one of more tokens than the
            model has, or lack a length; and when called, where they hold fewer prompts than are
            asked for.
    """
    from shadowkv_cli.tasks.tokenization import encode_prompt

    reader = reader_of(choice, dataset)
    tokenizer = tokenizer_of(reader)
    check_tokenizer(dataset, tokenizer, choice.name)
    if reader != choice:
        check_vocabulary(choice.name, vocab_size, reader.name, tokenizer)
    for length in context_lengths:
        if length not in dataset.context_lengths:
            held = ", ".join(map(str, dataset.context_lengths))
            raise UsageError(f"{dataset.path} has no context length {length}; it has {held}.")

    def make(context_length: int, count: int) -> list[list[int]]:
        by_task = [dataset.samples(context_length, task) for task in dataset.tasks]
        longest = max(map(len, by_task))
        texts = [task[i].text for i in range(longest) for task in by_task if i < len(task)]
        if len(texts) < count:
            raise UsageError(
                f"The data hold {len(texts)} prompts of {context_length} tokens, batch {count} "
                "needs as many: build more samples or use --state synthetic."
            )
        return [encode_prompt(tokenizer, text) for text in texts[:count]]

    return make


def measured_before(output: Path, fresh: bool) -> list[Row]:
    """Rows of the run that is continued; none where it is new."""
    if fresh or not (output / MANIFEST).is_file():
        return []
    return read_run(output).throughput


def measure_throughput(
    run: RunFolder,
    loaded: LoadedModel,
    cases: Sequence[Case],
    settings: BenchSettings,
    prompts: Callable[[int, int], list[list[int]]] | None,
) -> int:
    """Measure what has no row yet and append it; returns the number of failed measurements."""
    from shadowkv_cli.bench.throughput import check_comparable, check_done, run_cases

    rows = list(run.read("throughput"))
    check_comparable(rows, settings, loaded)
    done = check_done(rows)
    finished = sum(done(case, n) for case in cases for n in range(settings.rounds))
    if finished:
        notice(f"{finished} of {len(cases) * settings.rounds} measurements are done; continuing.")
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
        "model": model.label,
        "model_fingerprint": loaded.fingerprint,
        "dtype": loaded.dtype_name,
        "device": str(loaded.device),
        "state": settings.state,
        "decode_steps": settings.decode_steps,
        "warmup_steps": settings.warmup_steps,
    }


def benchmark(config: BenchConfig) -> tuple[Path, int]:
    """Measure the decode throughput of every method; continues a run that was stopped.

    Returns the run's folder and the number of failed measurements.
    """
    from shadowkv_cli.bench.cases import Room, make_cases
    from shadowkv_cli.bench.probes import measured_anew
    from shadowkv_cli.model.loading import load_model

    check_place(config.output)
    loaded = load_model(config.model)
    loaded.check(list(config.specs), max(config.settings.context_lengths))
    probe = None
    if loaded.device.type == "cuda":
        # It stands in the manifest. One from another day, or from a time when something else ran,
        # would mislead the planner and every percentage.
        probe = measured_anew(loaded.device, [loaded.dtype])
    before = measured_before(config.output, config.fresh)
    room = Room(loaded.shape, loaded.device, weight_bytes=loaded.weight_bytes, probe=probe)
    cases = make_cases(config.specs, config.settings, room, before)
    identity = bench_identity(loaded, config.model, config.settings)
    notes, flags = model_notes(loaded)
    prompts = None
    if config.settings.state == "prompts":
        assert config.data is not None
        dataset = Dataset.open(config.data)
        lengths = config.settings.context_lengths
        prompts = prompt_source(dataset, config.model, lengths, loaded.vocab_size)
        identity["data_fingerprint"] = dataset.fingerprint()
        notes, flags = data_notes(dataset, loaded)
    with RunFolder.open(
        config.output,
        kind="bench",
        identity=identity,
        scope={
            "cells": [spec.cell for spec in config.specs],
            "context_lengths": list(config.settings.context_lengths),
            "batch_rules": list(config.settings.batch_rules),
            "rounds": config.settings.rounds,
        },
        environment=environment_of(loaded) | low_rank_facts(loaded, config.specs),
        command=config.command,
        notes=notes,
        flags=flags,
        fresh=config.fresh,
    ) as run:
        failed = measure_throughput(run, loaded, cases, config.settings, prompts)
    return config.output, failed
