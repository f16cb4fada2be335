"""Build a RULER dataset: plan, check, then make and write the rows that are missing."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shadowkv_cli.catalogue.places import without_hub
from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.manifest import continue_manifest
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.ruler.definitions import GRID, NVIDIA, Dialect, choose_tasks, definitions
from shadowkv_cli.tasks.ruler.draws import Variant, Workbench
from shadowkv_cli.tasks.ruler.fit import Calibration
from shadowkv_cli.tasks.ruler.manifest import Fit, new_manifest, plan_ruler_rows
from shadowkv_cli.tasks.ruler.needle_grid import grid_depths
from shadowkv_cli.tasks.ruler.official.parity import differences
from shadowkv_cli.tasks.ruler.official.series import Series
from shadowkv_cli.tasks.ruler.samples import calibrate_task, make_sample
from shadowkv_cli.tasks.ruler.sentences import available_splitter
from shadowkv_cli.tasks.ruler.sources import (
    SourceKind,
    load_english_words,
    load_sources,
    source_choice,
)
from shadowkv_cli.tasks.ruler.words import wonderwords_version
from shadowkv_cli.tasks.ruler.workers import Job, TokenizerName, make_samples
from shadowkv_cli.tasks.tokenization import tokenizer_fingerprint
from shadowkv_cli.tasks.wrappers import AUTO, check_template_name, resolve_wrapper
from shadowkv_cli.tasks.writing import Piece, forecast, read_pieces, write_missing

TOKENS_WORTH_WORKERS = 5_000_000
"""Below this many tokens one process is done before others have started."""
MAX_AUTO_WORKERS = 8
MAX_DEPTHS = 101
MAX_CONTEXT = 16 * 1024**2
"""Tokens; a prompt is made in memory."""


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """What `shadowkv build-data ruler` was asked for.

    Attributes:
        tokenizer: hub name, folder, or `demo`.
        context_lengths: tokens of prompt and answer, one folder each.
        num_samples: per task and length; of a grid, per depth and length.
        output: folder of the dataset.
        tasks: names; None for all 13.
        template: a chat template's name; `auto` is the tokenizer's own.
        sources: where essays and questions come from; None is the hub, for `demo` synthetic.
        essays, squad, hotpotqa: local files that win over `sources`.
        english_words: RULER's json/english_words.json, for long lists of the official fit.
        fit: `best` fills every prompt; `official` is RULER's own, byte for byte.
        dialect: NVIDIA's wording and metrics, those of ShadowKV's authors, or a grid of needles.
        depths: how many depths a grid has, from 0 to 100 percent.
        shuffle_gold: spread the documents with the answers evenly over the prompts.
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
    english_words: Path | None = None
    fit: Fit = "best"
    dialect: Dialect = NVIDIA
    depths: int = 0
    shuffle_gold: bool = False
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
        if self.dialect == GRID and not 2 <= self.depths <= MAX_DEPTHS:
            raise UsageError(f"--depths must be from 2 to {MAX_DEPTHS}, not {self.depths}.")
        if self.num_workers is not None and self.num_workers < 1:
            raise UsageError(f"--num-workers must be at least 1, not {self.num_workers}.")
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"--output {self.output} is a file, not a folder.")
        if max(self.context_lengths) > MAX_CONTEXT:
            raise UsageError(
                f"A context length of {max(self.context_lengths)} is above {MAX_CONTEXT}, the "
                "longest that is built."
            )
        if self.fit == "official" and self.num_workers not in (None, 1):
            raise UsageError(
                "--num-workers has no effect with --fit official: every row of a file follows from "
                "those before it, so one process makes them."
            )
        if self.fit == "official" and self.dialect != NVIDIA:
            raise UsageError("--fit official is that of NVIDIA's RULER: leave out --dialect.")
        if self.english_words is not None and self.fit != "official":
            raise UsageError("--english-words has no effect without --fit official.")
        tasks = choose_tasks(self.tasks, self.dialect)
        if self.shuffle_gold and not {"qa_1", "qa_2"} & {*tasks}:
            raise UsageError("--shuffle-gold has no effect: none of the tasks has documents.")
        check_template_name(self.template)

    @property
    def source_kind(self) -> SourceKind:
        if self.sources is not None:
            return self.sources
        return "hub" if without_hub(self.tokenizer) is None else "synthetic"


class RulerBuild:
    """A build that was planned and checked; nothing is written before `run`."""

    def __init__(self, config: RulerConfig) -> None:
        """Load tokenizer and sources, read what exists, measure the first sample of each piece.

        Raises UsageError for a length that cannot hold a task and for a folder with other data.
        """
        self.config = config
        self.tasks = choose_tasks(config.tasks, config.dialect)
        self.tokenizer_name = TokenizerName(
            config.tokenizer, config.revision, config.trust_remote_code, config.offline
        )
        files = {"essays": config.essays, "squad": config.squad, "hotpotqa": config.hotpotqa}
        choice = source_choice(config.source_kind, **files)
        tokenizer: Any = self.tokenizer_name.load()
        sources = load_sources(self.tasks, config.source_kind, offline=config.offline, **files)
        if config.english_words is not None:
            load_english_words(sources, config.english_words)
        wrapper = resolve_wrapper(config.template, tokenizer)
        variant = Variant(config.dialect, config.depths, config.shuffle_gold)
        self.bench = Workbench(tokenizer, wrapper, sources, config.seed, variant)
        official = config.fit == "official"
        synthetic = choice["haystack"] == "synthetic"
        splitter = None if synthetic and not official else available_splitter()
        self.manifest = continue_manifest(
            config.output,
            new_manifest(
                fit=config.fit,
                dialect=config.dialect,
                seed=config.seed,
                tokenizer={
                    "name": config.tokenizer,
                    "revision": config.revision,
                    "fingerprint": tokenizer_fingerprint(tokenizer),
                },
                template=wrapper.to_manifest(),
                source_choice=choice,
                sources=sources.manifest,
                sentence_splitter=splitter,
                wonderwords=wonderwords_version(),
                depths=grid_depths(config.depths) if config.dialect == GRID else None,
                shuffle_gold=config.shuffle_gold,
                differences=(
                    differences(choice, splitter, wrapper, shuffle_gold=config.shuffle_gold)
                    if official
                    else None
                ),
            ),
        )
        num_rows = config.num_samples * max(config.depths, 1)
        plan_ruler_rows(self.manifest, self.tasks, config.context_lengths, num_rows)
        self.pieces = read_pieces(
            config.output,
            [
                (task, length, num_rows)
                for length in sorted(config.context_lengths)
                for task in self.tasks
            ],
        )
        missing = [piece for piece in self.pieces if piece.missing]
        self.series: dict[tuple[str, int], Series] = {}
        self.calibrations: dict[tuple[str, int], Calibration] = {}
        for piece in missing:
            place = piece.task, piece.context_length
            if official:
                self.series[place] = Series(self.bench, *place, piece.wanted)
            else:
                self.calibrations[place] = calibrate_task(self.bench, *place, piece.wanted)

    @cached_property
    def num_workers(self) -> int:
        if self.config.fit == "official":
            return 1
        if self.config.num_workers is not None:
            return self.config.num_workers
        tokens = sum(piece.missing * piece.context_length for piece in self.pieces)
        if tokens < TOKENS_WORTH_WORKERS:
            return 1
        return max(1, min(os.cpu_count() or 1, MAX_AUTO_WORKERS))

    def forecast(self) -> list[dict[str, Any]]:
        """What `run` would write, one entry per task and length, from one sample made of each."""

        def first(piece: Piece) -> Sample:
            if self.series:
                # The second row: the first was made with the search.
                place = piece.task, piece.context_length
                return self.series[place].sample(min(1, piece.wanted - 1))
            calibration = self.calibrations[piece.task, piece.context_length]
            return make_sample(self.bench, piece.task, piece.context_length, 0, calibration)

        return forecast(self.pieces, first, self.num_workers)

    def run(self) -> None:
        """Write the rows that are missing. What is finished stays if this is stopped."""
        samples = self._official_samples() if self.series else self._samples()
        try:
            write_missing(
                self.config.output,
                self.manifest,
                self.pieces,
                samples,
                list(definitions(self.config.dialect)),
            )
        finally:
            samples.close()

    def _samples(self) -> Generator[Sample, None, None]:
        jobs = (
            Job(piece.task, piece.context_length, index, calibration)
            for piece in self.pieces
            if (calibration := self.calibrations.get((piece.task, piece.context_length)))
            for index in piece.numbers
        )
        return make_samples(self.bench, self.tokenizer_name, jobs, self.num_workers)

    def _official_samples(self) -> Generator[Sample, None, None]:
        for piece in self.pieces:
            for index in piece.numbers:
                yield self.series[piece.task, piece.context_length].sample(index)
