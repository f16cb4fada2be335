"""The tasks as data: configuration, templates and constants, read from tasks.yaml.

The dialect of ShadowKV's authors has 11 of the 13, with other metrics and a few other words; the
grid of needles is one task of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from shadowkv_cli.errors import unknown_name
from shadowkv_cli.tasks.package_data import read_yaml

Dialect = Literal["nvidia", "shadowkv", "grid"]
NVIDIA: Dialect = "nvidia"
GRID: Dialect = "grid"
GRID_TASK = "niah_grid"


@dataclass(frozen=True)
class TaskDefinition:
    """One task.

    Attributes:
        name: as in RULER's synthetic.yaml.
        family: which generator makes it.
        template: the task's text with `{context}` and further fields.
        answer_prefix: what follows the prompt, behind the assistant's header.
        max_new_tokens: tokens that may be generated.
        metric: a name in the registry of metrics.
        settings: the generator's configuration.
    """

    name: str
    family: str
    template: str
    answer_prefix: str
    max_new_tokens: int
    metric: str
    settings: dict[str, Any]


@cache
def constants() -> dict[str, Any]:
    """tasks.yaml as it stands."""
    data: dict[str, Any] = read_yaml("ruler/tasks.yaml")
    return data


@cache
def shadowkv_constants() -> dict[str, Any]:
    """shadowkv.yaml as it stands."""
    data: dict[str, Any] = read_yaml("ruler/shadowkv.yaml")
    return data


@cache
def definitions(dialect: Dialect = NVIDIA) -> dict[str, TaskDefinition]:
    """All tasks of a dialect by name, in RULER's order."""
    if dialect == GRID:
        single = replace(_nvidia()["niah_single_2"], name=GRID_TASK, family="needle_grid")
        return {GRID_TASK: single}
    return _nvidia() if dialect == NVIDIA else _shadowkv()


def sizes_of(task: str) -> TaskDefinition:
    """A task by name alone, where the wording does not matter: for its lengths and sources."""
    return definitions()[task] if task in definitions() else definitions(GRID)[task]


def _shadowkv() -> dict[str, TaskDefinition]:
    prefixes, metrics = shadowkv_constants()["answer_prefixes"], shadowkv_constants()["metrics"]
    return {
        name: replace(
            task,
            metric=metrics[name],
            answer_prefix=prefixes.get(task.family, task.answer_prefix),
        )
        for name, task in _nvidia().items()
        if name in metrics
    }


def _nvidia() -> dict[str, TaskDefinition]:
    result = {}
    for name, entry in constants()["tasks"].items():
        settings = dict(entry)
        family = settings.pop("family")
        shared = constants()["families"][family]
        result[name] = TaskDefinition(name=name, family=family, settings=settings, **shared)
    return result


def choose_tasks(names: Iterable[str] | None, dialect: Dialect = NVIDIA) -> list[str]:
    """The asked tasks in RULER's order, all of them for None. Raises UsageError for others."""
    known = definitions(dialect)
    if names is None:
        return list(known)
    wanted = set()
    for name in names:
        if name not in known:
            raise unknown_name("task", name, known)
        wanted.add(name)
    return [name for name in known if name in wanted]
