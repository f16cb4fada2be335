"""Evaluation: which samples and cells are wanted, which are missing, and running those."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv_cli.answering import reader_of, tokenizer_of
from shadowkv_cli.batching import samples_together
from shadowkv_cli.catalogue.models import MODELS
from shadowkv_cli.config import MethodSpec, ModelShape, ShadowKVSpec
from shadowkv_cli.console import notice, progress
from shadowkv_cli.environment import capture
from shadowkv_cli.errors import UsageError, unknown_name
from shadowkv_cli.prefix_order import by_beginning
from shadowkv_cli.results import MANIFEST, RunFolder, RunKind, check_place, done_cells, read_run
from shadowkv_cli.run_config import EvalConfig, ModelChoice
from shadowkv_cli.tasks.metrics import check_metric
from shadowkv_cli.tasks.rows import Dataset, Sample

if TYPE_CHECKING:
    import torch

    from shadowkv_cli.model.loading import LoadedModel

RANDOM_NOTE = (
    "RANDOM WEIGHTS: the model was never trained, so there are times and memory, and no scores."
)


@dataclass
class Work:
    """The samples of an evaluation, and for each the cells that have no row yet."""

    samples: list[Sample]
    missing: dict[str, list[MethodSpec]] = field(default_factory=dict)

    @property
    def todo(self) -> list[Sample]:
        return [s for s in self.samples if self.missing.get(s.id)]

    @property
    def room(self) -> int:
        """Tokens that the longest answer may take."""
        return max(s.max_new_tokens for s in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(s.room for s in self.samples)


def choose_samples(config: EvalConfig, dataset: Dataset) -> Work:
    """Read the samples that are wanted.

    Raises UsageError for a task or length that the data do not hold.
    """
    for task in config.tasks or ():
        if task not in dataset.tasks:
            raise unknown_name("task", task, dataset.tasks, f"in {dataset.path}")
    for length in config.context_lengths or ():
        if length not in dataset.context_lengths:
            held = ", ".join(map(str, dataset.context_lengths))
            raise UsageError(f"{dataset.path} has no context length {length}; it has {held}.")
    samples = [
        sample
        for length in config.context_lengths or dataset.context_lengths
        for task in config.tasks or dataset.tasks
        for sample in dataset.samples(length, task, config.num_samples)
    ]
    if not samples:
        raise UsageError(f"{dataset.path} holds no sample of what was asked for.")
    for sample in samples:
        check_metric(sample)
    return Work([_shortened(sample, config.max_new_tokens) for sample in samples])


def _shortened(sample: Sample, most: int | None) -> Sample:
    """The sample with room for an answer of at most so many tokens."""
    if most is None:
        return sample
    if sample.second is not None and sample.second.max_new_tokens > most:
        sample = replace(sample, second=replace(sample.second, max_new_tokens=most))
    if sample.max_new_tokens <= most:
        return sample
    length = sample.length - sample.max_new_tokens + most
    return replace(sample, max_new_tokens=most, length=length)


def find_missing(work: Work, specs: Sequence[MethodSpec], done: Mapping[str, set[str]]) -> None:
    """Note which cells each sample lacks.

    Rows are compared within one prefill: a method that comes later runs beside full attention
    again, and full attention that comes later runs beside all of them.
    """
    for sample in work.samples:
        have = done.get(sample.id, set())
        lacking = [spec for spec in specs if spec.cell not in have]
        full = [spec for spec in specs if spec.name == "full"]
        if full and full[0] in lacking:
            lacking = list(specs)
        elif lacking and full:
            lacking = [*full, *lacking]
        work.missing[sample.id] = lacking


def check_tokenizer(dataset: Dataset, tokenizer: Any, name: str, *, allowed: bool = False) -> bool:
    """Compare the model's tokenizer with the one that fitted the data; True where they differ.

    Raises UsageError where they differ and that is not allowed.
    """
    from shadowkv_cli.tasks.tokenization import tokenizer_fingerprint

    made_with = dataset.manifest["tokenizer"]
    differs = tokenizer_fingerprint(tokenizer) != made_with["fingerprint"]
    if differs and not allowed:
        raise UsageError(
            f"{dataset.path} was built with the tokenizer {made_with['name']}, which is not that "
            f"of {name}: build data with --tokenizer {name}, or use --allow-tokenizer-mismatch."
        )
    return differs


def check_vocabulary(name: str, vocab_size: int, reader: str, tokenizer: Any) -> None:
    """Raise UsageError where a tokenizer has tokens that a model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"The tokenizer {reader} has {len(tokenizer):,} tokens, {name} takes {vocab_size:,}: "
            "use data of another tokenizer, or another shape."
        )


def check_settings(run_scope: Mapping[str, Any], specs: Sequence[MethodSpec], path: Path) -> None:
    """Refuse a method that an earlier command ran with other settings.

    Further cells of a method may join the ones that are there; replacing them is another run.
    """
    for name in dict.fromkeys(spec.name for spec in specs):
        before = {c for c in run_scope.get("cells", []) if c.split(":")[0] == name}
        now = {spec.cell for spec in specs if spec.name == name}
        if before and now - before and before - now:
            raise UsageError(
                f"'{path}' holds {_some(before)}, not {_some(now - before)}: choose another "
                "--output, --fresh to start over, or give the old settings beside the new."
            )


def _some(cells: set[str], most: int = 3) -> str:
    """The first few of the cells, and how many there are more."""
    names = sorted(cells)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def model_notes(loaded: LoadedModel) -> tuple[list[str], dict[str, bool]]:
    """What a reader of any result of this model must be told, and the same as flags."""
    known = MODELS.get(loaded.name)
    notes = [RANDOM_NOTE] if loaded.random_weights else []
    notes += [known.note] if known is not None and known.note else []
    return notes, {"random_weights": loaded.random_weights, "toy_model": loaded.name == "demo"}


def environment_of(loaded: LoadedModel) -> dict[str, Any]:
    """What a manifest says of machine and model: the stored probe and the licence among it."""
    from shadowkv_cli.bench import probes

    probe = probes.stored(probes.device_name(loaded.device))
    known = MODELS.get(loaded.name)
    return {
        **capture(str(loaded.device)),
        "probe": probe.as_json() if probe is not None else None,
        "model": {"source": known.source, "licence": known.licence} if known else None,
    }


def low_rank_facts(loaded: LoadedModel, specs: Sequence[MethodSpec]) -> dict[str, Any]:
    """How low-rank keys are found, where any are wanted."""
    from shadowkv_cli.methods.low_rank import method_for

    ranks = [spec.rank for spec in specs if isinstance(spec, ShadowKVSpec)]
    if not ranks:
        return {}
    return {"low_rank": method_for(loaded.shape.key_width, max(ranks))}


def data_notes(dataset: Dataset, loaded: LoadedModel) -> tuple[list[str], dict[str, bool]]:
    """The same for results on these data."""
    notes, flags = model_notes(loaded)
    if dataset.manifest.get("note"):
        notes.append(dataset.manifest["note"])
    return notes, {"synthetic": bool(dataset.manifest.get("synthetic")), **flags}


def run_identity(config: EvalConfig, loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    """What must be equal for rows to belong together."""
    return {
        "model": config.model.label,
        "model_fingerprint": loaded.fingerprint,
        "revision": config.model.revision,
        "dtype": loaded.dtype_name,
        "data": dataset.manifest["suite"],
        "data_fingerprint": dataset.fingerprint(),
        "allow_tokenizer_mismatch": config.allow_tokenizer_mismatch,
        **({"max_new_tokens": config.max_new_tokens} if config.max_new_tokens else {}),
    }


@dataclass
class Outcome:
    """What a run left behind."""

    path: Path
    missing_rows: int
    seconds: float


@dataclass(frozen=True)
class Ready:
    """Data, tokenizer and model of an evaluation, checked against each other.

    Attributes:
        reader: whose tokenizer it is.
    """

    dataset: Dataset
    work: Work
    reader: ModelChoice
    tokenizer: Any
    tokenizer_differs: bool
    loaded: LoadedModel


def check_ready(config: EvalConfig) -> Ready:
    """Load everything and refuse what cannot work, before the first prefill.

    Raises as `load_inputs` does, and UsageError for a place that the run cannot be written to.
    """
    check_place(config.output)
    if (config.output / MANIFEST).is_file() and not config.fresh:
        check_settings(
            read_run(config.output).manifest.get("scope", {}), config.specs, config.output
        )
    return load_inputs(config)


def load_inputs(config: EvalConfig) -> Ready:
    """Load data, tokenizer and model, and check them against each other.

    Raises:
        UsageError: the data, the model and the settings do not fit together.
        ShadowKVError: the model cannot be loaded.
    """
    from shadowkv_cli.model.loading import load_model

    dataset = Dataset.open(config.data)
    work = choose_samples(config, dataset)
    choice = config.model
    reader = reader_of(choice, dataset)
    tokenizer = tokenizer_of(reader)
    differs = check_tokenizer(
        dataset, tokenizer, choice.name, allowed=config.allow_tokenizer_mismatch
    )
    loaded = load_model(choice)
    loaded.check(list(config.specs), work.longest)
    if reader != choice:
        check_vocabulary(choice.name, loaded.vocab_size, reader.name, tokenizer)
    return Ready(dataset, work, reader, tokenizer, differs, loaded)


def open_run(config: EvalConfig, kind: RunKind, ready: Ready) -> RunFolder:
    """Create the run's folder or continue it, after checking that its settings are the same."""
    dataset, loaded = ready.dataset, ready.loaded
    notes, flags = data_notes(dataset, loaded)
    if ready.tokenizer_differs:
        notes.append("The data were fitted with another tokenizer than the model's.")
    if config.max_new_tokens:
        notes.append(
            f"Answers were cut at {config.max_new_tokens} tokens where the benchmark allows more."
        )
    for note in notes:
        notice(note)
    return RunFolder.open(
        config.output,
        kind=kind,
        identity=run_identity(config, loaded, dataset),
        scope={
            "cells": [spec.cell for spec in config.specs],
            "tasks": list(config.tasks or dataset.tasks),
            "context_lengths": list(config.context_lengths or dataset.context_lengths),
            "num_samples": config.num_samples,
        },
        environment=environment_of(loaded) | low_rank_facts(loaded, config.specs),
        command=config.command,
        notes=notes,
        flags=flags,
        fresh=config.fresh,
    )


def evaluate_loaded(config: EvalConfig, kind: RunKind, ready: Ready, run: RunFolder) -> Outcome:
    """Answer what has no row yet, sample by sample, and append the rows."""
    from shadowkv_cli.answering import Answerer, Question
    from shadowkv_cli.side_by_side import answer_all, in_batches

    started = time.monotonic()
    work = ready.work
    rows = list(run.read("predictions"))
    find_missing(work, config.specs, done_cells(rows, include_failed=False))
    passes: dict[str, int] = {}
    for row in rows:
        passes[row["id"]] = max(passes.get(row["id"], 0), row["pass"] + 1)
    todo = by_beginning(work.todo) if config.reuse_prefix else work.todo
    finished = len(work.samples) - len(todo)
    if finished:
        rest = "continuing" if todo else "nothing is left to run"
        notice(f"{finished} of {len(work.samples)} samples are done already; {rest}.")
    answerer = Answerer(
        ready.loaded,
        ready.tokenizer,
        backend=config.model.backend,
        room=work.room,
        tokenizer_mismatch=ready.tokenizer_differs,
        reuse_prefix=config.reuse_prefix,
    )
    tokens, missing = 0, 0
    size = batch_size_for(config, work, ready.loaded.shape, ready.loaded.device)
    run.record_environment(
        num_workers=config.num_workers, batch_size=size, reuse_prefix=config.reuse_prefix
    )
    recorded: dict[str, float | None] = {}  # at once, so that a killed run has it too
    with progress(f"{kind} {config.model.name}", len(work.samples)) as bar:
        bar.skip(finished)
        questions = [Question(s, work.missing[s.id], passes.get(s.id, 0)) for s in todo]
        batches = in_batches(questions, size, config.num_workers)
        for batch in answer_all(answerer, batches, config.model, ready.reader, config.num_workers):
            for answered in batch:
                run.append("predictions", answered.rows)
                tokens += answered.generated_tokens
                missing += len({r["cell"] for r in answered.rows if r["error"] is not None})
                if not answered.backends.keys() <= recorded.keys():
                    recorded |= answered.backends
                    run.record_environment(**_attention_facts(recorded))
            sample, rate = batch[-1].question.sample, tokens / (time.monotonic() - started)
            detail = f"{sample.task} {sample.context_length}, {rate:.0f} tokens/s"
            bar.advance(len(batch), detail=detail)  # at once: the time left is told by batches
    return Outcome(config.output, missing, time.monotonic() - started)


def batch_size_for(
    config: EvalConfig,
    work: Work,
    shape: ModelShape,
    device: torch.device,
    still_to_load: int = 0,
) -> int:
    """Samples that are decoded together: what was asked for, or as many as fit with ease."""
    if config.batch_size is not None:
        return config.batch_size
    import torch

    spread = device.type == "cuda" and config.model.device in ("auto", "cuda")
    sharing = math.ceil(config.num_workers / (torch.cuda.device_count() if spread else 1))
    longest = max(sample.prompt_tokens for sample in work.samples)
    return samples_together(
        config.specs,
        shape,
        device,
        longest,
        work.room,
        workers=sharing,
        still_to_load=still_to_load,
    )


def _attention_facts(backends: Mapping[str, float | None]) -> dict[str, Any]:
    """Which exact attention the rows came from, and what it reached in its trial on a GPU."""
    speeds = {name: round(speed, 1) for name, speed in backends.items() if speed is not None}
    return {
        "attention_backend": sorted(backends),
        **({"attention_tflops": speeds} if speeds else {}),
    }


def evaluate(config: EvalConfig) -> Outcome:
    """Answer every sample with every cell and write the rows, continuing where a run stopped.

    Raises:
        UsageError: the data, the model and the settings do not fit together.
        ShadowKVError: the model cannot be loaded, or the run cannot be written.
    """
    ready = check_ready(config)
    with open_run(config, "eval", ready) as run:
        return evaluate_loaded(config, "eval", ready, run)
