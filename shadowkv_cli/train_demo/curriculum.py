"""What is trained when: from repeats to the tasks as RULER asks them, from 256 ids to 32,768."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

REPEATS, PAIRS = "repeats", "pairs"
NEEDLES = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
)
GATES = (*NEEDLES, "vt")
"""A stage ends early when all of these that it has are right often enough."""

TASK_WEIGHTS = {
    "niah_single_1": 1.0,
    "niah_single_2": 1.0,
    "niah_single_3": 1.5,
    "niah_multikey_1": 1.0,
    "niah_multikey_2": 1.5,
    "niah_multikey_3": 2.5,
    "niah_multivalue": 2.0,
    "niah_multiquery": 2.0,
    "vt": 2.0,
    "cwe": 0.5,
    "fwe": 0.5,
    "qa_1": 0.6,
    "qa_2": 0.3,
}
LONG_LENGTH = 16_384
"""Rows of that length and longer are long."""
MIN_LENGTHS = {
    "niah_single_3": 256,
    "niah_multikey_2": 256,
    "niah_multikey_3": 512,
    "niah_multiquery": 512,
    "vt": 256,
    "cwe": 1024,
    "fwe": 512,
    "qa_1": 1024,
    "qa_2": 1024,
}
"""Shortest rows that hold a task; 256 where none is named."""
EXACT_LENGTHS = {"vt": 1024, "niah_multikey_3": 512, "qa_2": 4096}
"""Below these a task is never drawn as RULER asks it."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        tokens: ids in one step.
        lengths: row lengths with their weights; one is drawn for each step.
        repeats, pairs: shares of the rows; the tasks have the others.
        exact: share of the tasks' rows that ask as RULER does.
        gap: for pairs.
        enough: exact match (of tokens, where there are repeats only) that ends the stage.
        share: of all training time, at most.
        factors: a task's weight is so many times as large in long rows; 1 where none is named.
    """

    name: str
    tokens: int
    lengths: tuple[tuple[int, float], ...]
    repeats: float
    pairs: float
    exact: float
    gap: int
    enough: float
    share: float
    factors: dict[str, float] = field(default_factory=dict)

    def tasks(self, length: int) -> list[str]:
        """The tasks that rows of that length can hold."""
        if self.repeats + self.pairs >= 1:
            return []
        return [name for name in TASK_WEIGHTS if MIN_LENGTHS.get(name, 256) <= length]

    def weight(self, task: str, length: int) -> float:
        """Weight of a task among those that rows of that length can hold."""
        factor = self.factors.get(task, 1.0) if length >= LONG_LENGTH else 1.0
        return TASK_WEIGHTS[task] * factor


STAGES = (
    Stage("repeats", 32_768, ((256, 1.0),), 1.0, 0.0, 0.0, 0, 0.9, 0.08),
    Stage("pairs", 32_768, ((256, 1.0),), 0.3, 0.7, 0.0, 2, 0.9, 0.08),
    Stage("pairs in words", 32_768, ((256, 1.0),), 0.25, 0.4, 0.2, 6, 0.9, 0.1),
    Stage("512", 32_768, ((512, 1.0),), 0.2, 0.15, 0.3, 6, 0.93, 0.14),
    Stage("2k", 65_536, ((512, 1.0), (1024, 1.0), (2048, 1.0)), 0.15, 0.05, 0.4, 6, 0.95, 0.15),
    Stage(
        "8k",
        65_536,
        ((1024, 1.0), (2048, 1.0), (4096, 2.0), (8192, 1.5)),
        0.12,
        0.03,
        0.5,
        6,
        0.96,
        0.15,
    ),
    Stage(
        "32k",
        65_536,
        ((1024, 0.5), (2048, 0.5), (4096, 1.0), (8192, 1.0), (16_384, 1.5), (32_768, 2.5)),
        0.08,
        0.0,
        0.6,
        6,
        2.0,
        1.0,
    ),
)

CONTINUED = (
    replace(
        STAGES[-1],
        name="32k again",
        lengths=((1024, 0.3), (2048, 0.3), (4096, 0.8), (8192, 0.9), (16_384, 1.6), (32_768, 3.0)),
        factors={
            "niah_single_2": 1.5,
            "niah_multikey_2": 1.5,
            "niah_multikey_3": 2.5,
            "niah_multiquery": 1.5,
            "qa_1": 0.5,
            "qa_2": 0.5,
        },
    ),
)
"""For trained weights: more of what is learned last in long rows."""

TINY = (
    Stage("repeats", 512, ((256, 1.0),), 1.0, 0.0, 0.0, 0, 0.9, 0.3),
    Stage("all", 1024, ((512, 1.0), (1024, 1.0)), 0.1, 0.1, 0.5, 6, 2.0, 1.0),
)
"""For tests on a CPU."""
