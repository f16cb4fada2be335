"""What every task has in common: a draw of one sample, which can be rendered at any size."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shadowkv_cli.tasks.ruler.definitions import NVIDIA, Dialect, TaskDefinition
from shadowkv_cli.tasks.ruler.sources import Sources
from shadowkv_cli.tasks.tokenization import UnitCounter, encode_prompt
from shadowkv_cli.tasks.wrappers import Wrapper

SMALL_LENGTH = 4096
"""Below this length RULER makes smaller CWE lists."""


@dataclass(frozen=True)
class Rendered:
    """One sample at one size; the fields are those of a row (see `Sample`)."""

    prompt: str
    answer_prefix: str
    references: list[str]
    question_start: int
    depths: list[float] | None = None
    gold_documents: list[int] | None = None
    num_documents: int | None = None


@dataclass(frozen=True)
class Variant:
    """What else determines the rows of a dataset.

    Attributes:
        dialect: whose wording and metrics they have.
        depths: how many depths a grid has.
        shuffle_gold: whether the documents with the answer are spread evenly over the prompt.
    """

    dialect: Dialect = NVIDIA
    depths: int = 0
    shuffle_gold: bool = False


class Workbench:
    """What the samples of one dataset are made with; holds caches, so one per process."""

    def __init__(
        self,
        tokenizer: Any,
        wrapper: Wrapper,
        sources: Sources,
        seed: int,
        variant: Variant = Variant(),
    ) -> None:
        self.variant = variant
        self.tokenizer = tokenizer
        self.wrapper = wrapper
        self.sources = sources
        self.seed = seed
        self.counter = UnitCounter(tokenizer)
        self.characters_encoded = 0
        self._number_sums = [0]
        self.example_lines: int | None = None

    def count(self, text: str) -> int:
        """Tokens of a finished prompt, special tokens included."""
        self.characters_encoded += len(text)
        return len(encode_prompt(self.tokenizer, text))

    def number_tokens(self, last: int) -> int:
        """Tokens of the labels of a numbered list, from 1 to `last`."""
        sums = self._number_sums
        if len(sums) <= last:
            labels = (f" {i}." for i in range(len(sums), last + 1))
            for count in self.counter.counts(labels):
                sums.append(sums[-1] + count)
        return sums[last]

    def fixed_order(self) -> random.Random:
        """RULER's throw-away generator for orderings: the same for every sample."""
        return random.Random(self.seed)

    def render(
        self,
        template: str,
        answer_prefix: str,
        context: str,
        fields: dict[str, Any],
        *,
        example: str = "",
        turn_before: str = "",
        wrapper: Wrapper | None = None,
    ) -> tuple[str, str, int]:
        """Fill a template: (prompt, answer prefix, question start).

        `example` stands before the task's text inside the turn; `turn_before` is a whole turn
        before it, which then has the BOS. `wrapper` takes the place of the dataset's own.
        """
        wrapper = wrapper or self.wrapper
        head, tail = template.split("{context}")
        opening = example + head.format(**fields) + context
        closing = tail.format(**fields)
        first = not turn_before
        prompt = turn_before + wrapper.wrap(opening + closing, first=first)
        start = len(turn_before) + wrapper.offset(first=first) + len(opening)
        start += len(closing) - len(closing.lstrip())
        return prompt, answer_prefix.format(**fields), start


class Draw(ABC):
    """All that is random in one sample. `render(n)` is a function of the draw and of n only.

    Units are what a prompt grows by: words, lines, distinct words, documents, steps of N. The
    first n units of a draw are a prefix of its first n + 1.
    """

    min_units: int

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        self.bench = bench
        self.task = task
        self.context_length = context_length
        self.index = index

    def rng(self, stream: str) -> random.Random:
        """A generator for one purpose, which depends on nothing but the sample's coordinates."""
        key = f"{self.bench.seed}/{self.task.name}/{self.context_length}/{self.index}/{stream}"
        return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))

    @abstractmethod
    def render(self, units: int) -> Rendered:
        """The sample with that many units, at least `min_units`."""

    @abstractmethod
    def estimate(self, units: int) -> float:
        """A size of that many units that the token count grows with, cheap for any number."""

    def fixed_tokens(self) -> int:
        """Estimated tokens of what differs between samples and does not grow, such as needles."""
        return 0

    def tokens_between(self, low: int, high: int, scale: float) -> float:
        """Estimated tokens that the units from `low` to `high` add; exact where that is cheap."""
        return scale * (self.estimate(high) - self.estimate(low))

    @cached_property
    def base_tokens(self) -> int:
        """Tokens of the task's text without any context, for sizes that RULER derives from them."""
        template = self.task.template.replace("{context}", "")
        return self.bench.counter.total(
            [self.bench.wrapper.wrap(template + self.task.answer_prefix)]
        )


def distinct_positions(fractions: Sequence[float], size: int) -> list[int]:
    """Map fractions in [0, 1) to distinct positions in range(size), in the order given.

    The j-th fraction picks among the positions that are left, so uniform fractions give what
    `random.sample(range(size), k)` gives, for every size from the same draw, and positions move
    little when the size grows.
    """
    assert len(fractions) <= size, f"{len(fractions)} positions in {size}"
    taken: list[int] = []
    for j, fraction in enumerate(fractions):
        position = int(fraction * (size - j))
        for other in sorted(taken):
            position += position >= other
        taken.append(position)
    return taken
