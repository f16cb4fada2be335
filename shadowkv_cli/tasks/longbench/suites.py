"""LongBench, LongBench-E and LongBench v2 as what a build needs to know of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from shadowkv_cli.tasks.longbench.definitions import all_tasks, set_of
from shadowkv_cli.tasks.longbench.items import Item, parse_rows, v1_item, v2_item
from shadowkv_cli.tasks.longbench.metrics import V2_METRIC
from shadowkv_cli.tasks.package_data import read_yaml

LONGBENCH, LONGBENCH_E, LONGBENCH_V2 = "longbench", "longbench-e", "longbench-v2"
Compat = Literal["true", "official"]
V2Prompt = Literal["0shot", "cot", "no-context"]
V2_ROWS = 503


@dataclass(frozen=True)
class Rules:
    """How the samples of a dataset are asked and scored; see `Sample`."""

    metric: str
    max_new_tokens: int
    postprocess: str | None = None
    stop: tuple[str, ...] | None = None
    chat_template: bool = True
    second_max_new_tokens: int = 0


class Suite(Protocol):
    """One benchmark with its choices.

    Attributes:
        name: of the suite, in manifests.
        repository, hub_file: where it is published.
        tasks: those that were asked for.
        all_tasks: names in the benchmark's order.
        settings: choices that determine rows or scores, for the manifest.
    """

    @property
    def name(self) -> str: ...
    @property
    def repository(self) -> str: ...
    @property
    def hub_file(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def all_tasks(self) -> list[str]: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def file(self, task: str) -> str:
        """Name of the file with a task's rows."""

    def items(self, task: str, content: bytes) -> list[Item]:
        """The rows of that file. Raises UsageError for what is not the benchmark's."""

    def rules(self, task: str) -> Rules:
        """How its samples are asked and scored."""

    def published_rows(self, task: str) -> int:
        """Rows of the published file."""


@dataclass(frozen=True)
class V1Suite:
    """LongBench, or LongBench-E. `compat` official: ROUGE-L with LongBench's zeros."""

    tasks: tuple[str, ...]
    e: bool = False
    compat: Compat = "true"
    repository: str = "THUDM/LongBench"
    hub_file: str = "data.zip"

    @property
    def name(self) -> str:
        return LONGBENCH_E if self.e else LONGBENCH

    @property
    def all_tasks(self) -> list[str]:
        return all_tasks(e=self.e)

    @property
    def settings(self) -> dict[str, Any]:
        return {"rouge": self.compat}

    def file(self, task: str) -> str:
        return f"{task}.jsonl"

    def items(self, task: str, content: bytes) -> list[Item]:
        name, entry = self.file(task), set_of(task)
        rows = parse_rows(content, name)
        return [v1_item(row, i, entry, name, self.e) for i, row in enumerate(rows)]

    def rules(self, task: str) -> Rules:
        entry = set_of(task)
        official = self.compat == "official" and "rouge" in entry.metric
        return Rules(
            entry.metric + ("_official" if official else ""),
            entry.max_new_tokens,
            entry.postprocess,
            entry.stop,
            entry.chat_template,
        )

    def published_rows(self, task: str) -> int:
        entry = set_of(task)
        return entry.rows_e if self.e and entry.rows_e else entry.rows


@dataclass(frozen=True)
class V2Suite:
    """LongBench v2: one task, asked with the document, in two calls, or without the document."""

    prompt: V2Prompt = "0shot"
    name: str = LONGBENCH_V2
    repository: str = "THUDM/LongBench-v2"
    hub_file: str = "data.json"

    @property
    def tasks(self) -> tuple[str, ...]:
        return (LONGBENCH_V2,)

    @property
    def all_tasks(self) -> list[str]:
        return [LONGBENCH_V2]

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt}

    def file(self, task: str) -> str:
        return self.hub_file

    def items(self, task: str, content: bytes) -> list[Item]:
        texts, second = read_yaml("longbench/prompts_v2.yaml"), None
        if self.prompt == "cot":
            prompt, second = texts["cot"]["first"], texts["cot"]["second"]
        else:
            prompt = texts["prompts"][self.prompt]
        rows = parse_rows(content, self.hub_file)
        return [v2_item(row, i, prompt, self.hub_file, second) for i, row in enumerate(rows)]

    def rules(self, task: str) -> Rules:
        texts = read_yaml("longbench/prompts_v2.yaml")
        answer = int(texts["max_new_tokens"])
        if self.prompt == "cot":
            thought = int(texts["cot"]["max_new_tokens"])
            return Rules(V2_METRIC, thought, second_max_new_tokens=answer)
        return Rules(V2_METRIC, answer)

    def published_rows(self, task: str) -> int:
        return V2_ROWS
