"""RULER's own fit: one size for all samples of a file, from which single samples lose whole steps.

As in NVIDIA/RULER c3f5e3b: an estimate and a binary search draw from the stream before sample 0;
every try at a sample is a new draw. Special tokens that the text does not spell are not counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.tasks.ruler.definitions import TaskDefinition
from shadowkv_cli.tasks.ruler.draws import Rendered, Workbench
from shadowkv_cli.tasks.ruler.fit import DoesNotFit
from shadowkv_cli.tasks.ruler.official.stream import Stream
from shadowkv_cli.tasks.tokenization import count_plain

SLACK = 3
"""The search goes up to so many times the estimate."""
TRIES_AT_THE_SMALLEST = 50
"""RULER tries forever."""


class NoRoom(Exception):
    """A draw that RULER's code cannot finish, such as more places than lines."""


class Generator(ABC):
    """One task's file in RULER's order; a sample depends on all that came before it.

    Attributes:
        step: units that a sample loses when it is too long; also where the search starts.
        estimate_units: size of the first draw, from which tokens per unit are estimated.
        example_tokens: tokens of an example that the search adds to each text.
    """

    step: int
    estimate_units: int
    example_tokens = 0

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int) -> None:
        self.bench = bench
        self.task = task
        self.context_length = context_length
        self.stream = Stream(bench.seed)

    @abstractmethod
    def draw(self, index: int, units: int) -> Rendered:
        """A new draw of that size for question `index`. Raises NoRoom."""

    def draw_to_measure(self, units: int) -> str:
        """What the search counts: the text of a draw."""
        rendered = self.draw(0, units)
        return rendered.prompt + rendered.answer_prefix

    def most_units(self, tokens_per_unit: float) -> int:
        """Where the search ends."""
        return int((self.context_length / tokens_per_unit) * SLACK)

    def count(self, text: str) -> int:
        """Tokens that RULER counts."""
        self.bench.characters_encoded += len(text)
        return count_plain(self.bench.tokenizer, [text])[0]

    @cached_property
    def units(self) -> int:
        """The size that every sample is tried at first; moves the stream on when it is found."""
        try:
            estimated = self.count(self.draw_to_measure(self.estimate_units))
            low = self.step
            high = max(self.most_units(estimated / self.estimate_units), 2 * self.step)
            answer = self.task.max_new_tokens + self.example_tokens
            found = None
            while low <= high:
                middle = (low + high) // 2
                if self.count(self.draw_to_measure(middle)) + answer <= self.context_length:
                    found, low = middle, middle + 1
                else:
                    high = middle - 1
        except NoRoom as error:
            raise ShadowKVError(
                f"RULER's own generator of {self.task.name} stops at a context length of "
                f"{self.context_length} with seed {self.bench.seed} ({error}): use another."
            ) from None
        return self.step if found is None else found

    def make(self, index: int) -> tuple[Rendered, int]:
        """The next sample and its tokens, as RULER counts them. Raises DoesNotFit."""
        units, limit = self.units, self.context_length - self.task.max_new_tokens
        tokens = limit + 1
        for _ in range(TRIES_AT_THE_SMALLEST + units // self.step):
            try:
                rendered = self.draw(index, units)
                tokens = self.count(rendered.prompt + rendered.answer_prefix)
                if tokens <= limit:
                    return rendered, tokens
            except NoRoom:
                pass  # RULER swallows it and tries again
            if units > self.step:
                units -= self.step
        raise DoesNotFit(tokens)
