"""Build LongBench or LongBench v2: read the published file, write the rows that are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowkv_cli.console import notice, progress
from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.longbench.items import Item
from shadowkv_cli.tasks.longbench.manifest import (
    add_lost_middle,
    count_lost_middle,
    new_manifest,
    set_note,
)
from shadowkv_cli.tasks.longbench.prompts import TaskRules, context_length_for, make_sample
from shadowkv_cli.tasks.longbench.source import Source, hub_file
from shadowkv_cli.tasks.longbench.suites import Suite
from shadowkv_cli.tasks.manifest import continue_manifest, plan_rows
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer, tokenizer_fingerprint
from shadowkv_cli.tasks.wrappers import AUTO, BASE, check_template_name, resolve_wrapper
from shadowkv_cli.tasks.writing import forecast, read_pieces, write_missing

LEAST_MAX_LENGTH = 64
MAX_CONTEXT = 16 * 1024**2


@dataclass(frozen=True, kw_only=True)
class LongBenchConfig:
    """What `shadowkv build-data longbench` or `longbench-v2` was asked for.

    Attributes:
        tokenizer: hub name, folder, `demo` or `smollm2`.
        output: folder of the dataset.
        suite: the benchmark with its prompts.
        source: archive, folder or file; None is the hub.
        num_samples: of each dataset; None takes all.
        max_length: tokens; longer prompts lose their middle, before the chat template.
        min_length: tokens; shorter prompts are left out.
        template: a chat template's name; `auto` is the tokenizer's own.
        revision, trust_remote_code, offline: how the tokenizer is loaded.
    """

    tokenizer: str
    output: Path
    suite: Suite
    max_length: int
    source: Path | None = None
    num_samples: int | None = None
    min_length: int | None = None
    template: str = AUTO
    revision: str | None = None
    trust_remote_code: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise UsageError(f"--num-samples must be at least 1, not {self.num_samples}.")
        if not LEAST_MAX_LENGTH <= self.max_length <= MAX_CONTEXT:
            raise UsageError(
                f"--max-length must be from {LEAST_MAX_LENGTH} to {MAX_CONTEXT} tokens, not "
                f"{self.max_length}."
            )
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"--output {self.output} is a file, not a folder.")
        check_template_name(self.template)


class LongBenchBuild:
    """A build that was planned and checked; nothing is written before `run`."""

    num_workers = 1

    def __init__(self, config: LongBenchConfig) -> None:
        """Load the tokenizer, read and check the files, choose their rows.

        Raises UsageError for a file that is not LongBench's and for a folder with other data.
        """
        self.config, suite = config, config.suite
        source = config.source
        if source is not None:
            self.source = Source(source)
        self.tokenizer: Any = load_tokenizer(
            config.tokenizer,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            offline=config.offline,
        )
        if source is None:
            self.source = Source(hub_file(suite.repository, suite.hub_file, offline=config.offline))
        self.wrapper = resolve_wrapper(config.template, self.tokenizer)
        self.base = resolve_wrapper(BASE, self.tokenizer)
        self.context_length = context_length_for(
            config.max_length,
            max(suite.rules(task).max_new_tokens for task in suite.all_tasks),
            len(encode_prompt(self.tokenizer, self.wrapper.wrap(""))),
        )
        sources: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[int]] = {}
        partial = []
        for task in suite.tasks:
            content = self.source.read(suite.file(task))
            items = suite.items(task, content)
            sources[task] = {
                "name": self.source.name if config.source is not None else suite.repository,
                "sha256": hashlib.sha256(content).hexdigest(),
                "synthetic": False,
            }
            if len(items) < (published := suite.published_rows(task)):
                partial.append(f"{task} {len(items)} of {published}")
            if kept := self._chosen(task, items):
                self.rows[task] = kept
        if partial:
            notice(f"The source does not hold all published rows: {', '.join(partial)}.")
        if not self.rows:
            raise UsageError(f"No sample has --min-length {config.min_length} tokens.")
        self.manifest = continue_manifest(
            config.output,
            new_manifest(
                suite,
                tokenizer={
                    "name": config.tokenizer,
                    "revision": config.revision,
                    "fingerprint": tokenizer_fingerprint(self.tokenizer),
                },
                template=self.wrapper.to_manifest(),
                max_length=config.max_length,
                min_length=config.min_length,
                sources=sources,
            ),
        )
        counts = {task: len(rows) for task, rows in self.rows.items()}
        plan_rows(self.manifest, self.context_length, counts, suite.all_tasks)
        set_note(self.manifest, suite)
        self.pieces = read_pieces(
            config.output,
            [(task, self.context_length, count) for task, count in counts.items()],
        )
        self.manifest["lost_middle"].get(str(self.context_length), {}).clear()
        for task in self.manifest["rows"][str(self.context_length)]:
            file = config.output / str(self.context_length) / f"{task}.jsonl"
            add_lost_middle(self.manifest, self.context_length, task, count_lost_middle(file))

    def _chosen(self, task: str, items: list[Item]) -> list[int]:
        """Places of the rows that are taken: the first that are long enough."""
        most, least = self.config.num_samples, self.config.min_length
        if least is None:
            return list(range(len(items)))[:most]
        kept: list[int] = []
        with progress(f"measuring {task}", len(items)) as bar:
            for place, item in enumerate(items):
                if most is not None and len(kept) == most:
                    break
                if len(encode_prompt(self.tokenizer, item.text)) >= least:
                    kept.append(place)
                bar.advance()
        if not kept:
            notice(f"{task} has no prompt of {least} tokens or more: left out.")
        return kept

    def _rules(self, task: str) -> TaskRules:
        rules = self.config.suite.rules(task)
        wrapper = self.wrapper if rules.chat_template else self.base
        return TaskRules(
            task,
            rules.metric,
            rules.max_new_tokens,
            rules.postprocess,
            rules.stop,
            wrapper,
            rules.second_max_new_tokens,
        )

    def _samples(self, task: str, numbers: range) -> Iterator[Sample]:
        suite, rules = self.config.suite, self._rules(task)
        items = suite.items(task, self.source.read(suite.file(task)))
        for index in numbers:
            sample = make_sample(
                self.tokenizer,
                items[self.rows[task][index]],
                index,
                rules,
                max_length=self.config.max_length,
                context_length=self.context_length,
            )
            if sample.middle_tokens_cut:
                add_lost_middle(self.manifest, self.context_length, task, 1)
            yield sample

    def forecast(self) -> list[dict[str, Any]]:
        """What `run` would write, one entry per dataset, from one sample made of each."""
        return forecast(self.pieces, lambda piece: next(self._samples(piece.task, piece.numbers)))

    def run(self) -> None:
        """Write the rows that are missing. What is finished stays if this is stopped."""
        samples = (
            sample
            for piece in self.pieces
            if piece.missing
            for sample in self._samples(piece.task, piece.numbers)
        )
        order = self.config.suite.all_tasks
        write_missing(self.config.output, self.manifest, self.pieces, samples, order)
