"""The 21 datasets as data, read from datasets.yaml, and which of them are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from shadowkv_cli.errors import UsageError, unknown_name
from shadowkv_cli.tasks.package_data import read_yaml

Language = Literal["en", "zh", "all"]
E_SUFFIX = "_e"
"""Behind the names of the datasets of LongBench-E."""


@dataclass(frozen=True)
class LongBenchSet:
    """One dataset.

    Attributes:
        category: one of six; the official mean is over them.
        language: en, zh, or code, which counts in the means of both languages.
        rows, rows_e: that the published files of LongBench and LongBench-E hold; `rows_e` is None
            where LongBench-E does not have the set.
        metric, postprocess, stop: as a `Sample` has them.
        max_new_tokens: tokens that may be generated.
        prompt: with `{context}` and mostly `{input}`.
        chat_template: whether the prompt gets the model's chat template.
    """

    category: str
    language: str
    rows: int
    metric: str
    max_new_tokens: int
    prompt: str
    postprocess: str | None = None
    stop: tuple[str, ...] | None = None
    chat_template: bool = True
    rows_e: int | None = None


@cache
def longbench_sets() -> dict[str, LongBenchSet]:
    """All datasets by name, in LongBench's order."""
    entries = read_yaml("longbench/datasets.yaml")["datasets"]
    for entry in entries.values():
        if "stop" in entry:
            entry["stop"] = tuple(entry["stop"])
    return {name: LongBenchSet(**entry) for name, entry in entries.items()}


def set_of(task: str) -> LongBenchSet:
    """The dataset behind a task's name, that of LongBench-E too."""
    return longbench_sets()[task.removesuffix(E_SUFFIX)]


def all_tasks(*, e: bool) -> list[str]:
    """Names of the tasks of LongBench, or of LongBench-E with its suffix."""
    if e:
        return [name + E_SUFFIX for name, entry in longbench_sets().items() if entry.rows_e]
    return list(longbench_sets())


def choose_sets(names: Iterable[str] | None, language: Language, *, e: bool) -> list[str]:
    """The asked tasks in LongBench's order; of LongBench-E with or without the suffix.

    Code counts as both languages. Raises UsageError for an unknown name and where none is left.
    """
    known = all_tasks(e=e)
    wanted = None
    if names is not None:
        wanted = {n if n in known or not e else n + E_SUFFIX for n in names}
        for name in wanted:
            if name not in known:
                raise unknown_name("dataset", name, known)
    chosen = [
        name
        for name in known
        if (wanted is None or name in wanted)
        and (language == "all" or set_of(name).language in (language, "code"))
    ]
    if not chosen:
        raise UsageError(f"None of these datasets is of the language {language}.")
    return chosen
