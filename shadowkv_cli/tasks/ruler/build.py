"""Build a RULER dataset: plan, check, then make and write the rows that are missing."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shadowkv_cli.catalogue.places import without_hub
from shadowkv_cli.console import progress
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.row_file import RowWriter, continue_rows, lock_folder
from shadowkv_cli.tasks.ruler.definitions import choose_tasks
from shadowkv_cli.tasks.ruler.draws import Workbench
from shadowkv_cli.tasks.ruler.fit import Calibration
from shadowkv_cli.tasks.ruler.manifest import (
    continue_manifest,
    new_manifest,
    plan_rows,
    set_fill,
    write_manifest,
)
from shadowkv_cli.tasks.ruler.samples import calibrate_task, make_sample
from shadowkv_cli.tasks.ruler.sentences import available_splitter
from shadowkv_cli.tasks.ruler.sources import SourceKind, load_sources, source_choice
from shadowkv_cli.tasks.ruler.words import wonderwords_version
from shadowkv_cli.tasks.ruler.workers import Job, TokenizerName, make_samples
from shadowkv_cli.tasks.ruler.wrappers import AUTO, check_template_name, resolve_wrapper
from shadowkv_cli.tasks.tokenization import tokenizer_fingerprint

TOKENS_WORTH_WORKERS = 5_000_000
"""Below this many tokens one process is done before others have started."""
MAX_AUTO_WORKERS = 8
MAX_CONTEXT = 16 * 1024**2
"""Tokens; a prompt is made in memory."""


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """What `shadowkv build-data ruler` was asked for.

    Attributes:
        tokenizer: hub name, folder, or `demo`.
        context_lengths: tokens of prompt and answer, one folder each.
        num_samples: per task and length.
        output: folder of the dataset.
        tasks: names; None for all 13.
        template: a chat template's name; `auto` is the tokenizer's own.
        sources: where essays and questions come from; None is the hub, for `demo` synthetic.
        essays, squad, hotpotqa: local files that win over `sources`.
        seed: determines every row.
        num_workers: processes; None takes several where there is enough to do.
        revision, trust_remote_code, offline: how the tokenizer is loaded.
    """

    tokenizer: str
    context_lengths: tuple[int, ...]
    num_samples: int
    output: Path
    tasks: tuple[str, ...] | None = None
    template: str = AUTO
    sources: SourceKind | None = None
    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    seed: int = 42
    num_workers: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        if not self.context_lengths:
            raise UsageError("No context length: give one with --context-length, such as 4k.")
        if self.num_samples < 1:
            raise UsageError(f"--num-samples must be at least 1, not {self.num_samples}.")
        if self.num_workers is not None and self.num_workers < 1:
            raise UsageError(f"--num-workers must be at least 1, not {self.num_workers}.")
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"--output {self.output} is a file, not a folder.")
        if max(self.context_lengths) > MAX_CONTEXT:
            raise UsageError(
                f"A context length of {max(self.context_lengths)} is above {MAX_CONTEXT}, the "
                "longest that is built."
            )
        choose_tasks(self.tasks)
        check_template_name(self.template)

    @property
    def source_kind(self) -> SourceKind:
        if self.sources is not None:
            return self.sources
        return "hub" if without_hub(self.tokenizer) is None else "synthetic"


@dataclass(frozen=True)
class Piece:
    """The rows of one task and length: the lengths of those that exist, and how many are wanted."""

    task: str
    context_length: int
    existing: list[int]
    wanted: int
    calibration: Calibration | None

    @property
    def missing(self) -> int:
        return max(self.wanted - len(self.existing), 0)


class RulerBuild:
    """A build that was planned and checked; nothing is written before `run`."""

    def __init__(self, config: RulerConfig) -> None:
        """Load tokenizer and sources, read what exists, measure the first sample of each piece.

        Raises UsageError for a length that cannot hold a task and for a folder with other data.
        """
        self.config = config
        self.tasks = choose_tasks(config.tasks)
        self.tokenizer_name = TokenizerName(
            config.tokenizer, config.revision, config.trust_remote_code, config.offline
        )
        files = {"essays": config.essays, "squad": config.squad, "hotpotqa": config.hotpotqa}
        choice = source_choice(config.source_kind, **files)
        tokenizer: Any = self.tokenizer_name.load()
        sources = load_sources(self.tasks, config.source_kind, offline=config.offline, **files)
        wrapper = resolve_wrapper(config.template, tokenizer)
        self.bench = Workbench(tokenizer, wrapper, sources, config.seed)
        self.manifest = continue_manifest(
            config.output,
            new_manifest(
                seed=config.seed,
                tokenizer={
                    "name": config.tokenizer,
                    "revision": config.revision,
                    "fingerprint": tokenizer_fingerprint(tokenizer),
                },
                template=wrapper.to_manifest(),
                source_choice=choice,
                sources=sources.manifest,
                sentence_splitter=(
                    None if choice["haystack"] == "synthetic" else available_splitter()
                ),
                wonderwords=wonderwords_version(),
            ),
        )
        plan_rows(self.manifest, self.tasks, config.context_lengths, config.num_samples)
        # Reading repairs a last row that was cut off: not while another process writes it.
        with lock_folder(config.output) if config.output.is_dir() else nullcontext():
            self.pieces = [
                self._piece(task, length)
                for length in sorted(config.context_lengths)
                for task in self.tasks
            ]

    def _file(self, task: str, context_length: int) -> Path:
        return self.config.output / str(context_length) / f"{task}.jsonl"

    def _piece(self, task: str, context_length: int) -> Piece:
        existing = continue_rows(self._file(task, context_length), task, context_length)
        wanted = self.config.num_samples
        calibration = None
        if len(existing) < wanted:
            calibration = calibrate_task(self.bench, task, context_length, wanted)
        return Piece(task, context_length, existing, wanted, calibration)

    @cached_property
    def num_workers(self) -> int:
        if self.config.num_workers is not None:
            return self.config.num_workers
        tokens = sum(piece.missing * piece.context_length for piece in self.pieces)
        if tokens < TOKENS_WORTH_WORKERS:
            return 1
        return max(1, min(os.cpu_count() or 1, MAX_AUTO_WORKERS))

    def forecast(self) -> list[dict[str, Any]]:
        """What `run` would write, one entry per task and length, from one sample made of each."""
        entries = []
        for piece in self.pieces:
            entry: dict[str, Any] = {
                "context_length": piece.context_length,
                "task": piece.task,
                "existing": len(piece.existing),
                "prompts": piece.missing,
                "tokens": 0,
                "bytes": 0,
                "seconds": 0.0,
            }
            if piece.calibration is not None:
                start = time.perf_counter()
                sample = make_sample(
                    self.bench, piece.task, piece.context_length, 0, piece.calibration
                )
                seconds = time.perf_counter() - start
                entry["tokens"] = piece.missing * sample.prompt_tokens
                entry["bytes"] = piece.missing * (len(sample.to_json().encode()) + 1)
                entry["seconds"] = round(piece.missing * seconds / self.num_workers, 3)
            entries.append(entry)
        return entries

    def run(self) -> None:
        """Write the rows that are missing. What is finished stays if this is stopped."""
        output = self.config.output
        output.mkdir(parents=True, exist_ok=True)
        with lock_folder(output):
            self._write_missing(output)

    def _write_missing(self, output: Path) -> None:
        for piece in self.pieces:
            file = self._file(piece.task, piece.context_length)
            if len(continue_rows(file, piece.task, piece.context_length)) != len(piece.existing):
                raise ShadowKVError(
                    f"Another shadowkv process wrote to {output} meanwhile: run the same command "
                    "again to continue."
                )
        write_manifest(output, self.manifest)
        jobs = (
            Job(piece.task, piece.context_length, index, piece.calibration)
            for piece in self.pieces
            if piece.calibration is not None
            for index in range(len(piece.existing), piece.wanted)
        )
        samples = make_samples(self.bench, self.tokenizer_name, jobs, self.num_workers)
        try:
            for piece in self.pieces:
                lengths = list(piece.existing)
                if piece.missing:
                    label = f"{piece.task} at {piece.context_length}"
                    path = self._file(piece.task, piece.context_length)
                    with progress(label, piece.missing) as bar, RowWriter(path) as writer:
                        for _ in range(piece.missing):
                            sample = next(samples)
                            writer.append(sample)
                            lengths.append(sample.length)
                            bar.advance()
                # A folder with more rows than were asked for keeps them.
                set_fill(self.manifest, piece.task, piece.context_length, lengths)
                write_manifest(output, self.manifest)
        finally:
            samples.close()
