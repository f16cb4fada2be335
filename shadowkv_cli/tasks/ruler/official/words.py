"""Common and frequent words in RULER's order of draws."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.ruler.common_words import EXAMPLE, SMALL_EXAMPLE, SMALL_REPEATS
from shadowkv_cli.tasks.ruler.definitions import TaskDefinition
from shadowkv_cli.tasks.ruler.draws import SMALL_LENGTH, Rendered, Workbench
from shadowkv_cli.tasks.ruler.fit import DoesNotFit
from shadowkv_cli.tasks.ruler.frequent_words import NOISE_WORD, NUM_ANSWERS, TOKENS_PER_WORD
from shadowkv_cli.tasks.ruler.official.search import Generator, NoRoom
from shadowkv_cli.tasks.ruler.words import common_word_pool

WORD_STEP = 10
ESTIMATE_WORDS = 4096
CODED_LETTERS = 6
STEPS = 32
"""FWE grows by this part of the context."""


class CommonWordsGenerator(Generator):
    """The numbered list after a solved one in a turn of its own; units are distinct words."""

    step = WORD_STEP
    estimate_units = ESTIMATE_WORDS

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int) -> None:
        super().__init__(bench, task, context_length)
        self.small = context_length < SMALL_LENGTH
        self.num_common: int = task.settings["common_words"]

    @cached_property
    def _pool(self) -> list[str]:
        pool = list(common_word_pool())
        self.bench.fixed_order().shuffle(pool)
        return pool

    def most_units(self, tokens_per_unit: float) -> int:
        return int(self.context_length // tokens_per_unit) * 2

    def _words(self, count: int) -> list[str]:
        source: Sequence[str] = self._pool
        if count > len(source):
            if self.bench.sources.english_words is None:
                raise UsageError(
                    f"cwe at {self.context_length} tokens needs RULER's json/english_words.json: "
                    "give it with --english-words, or leave out cwe or --fit official."
                )
            source = self.bench.sources.english_words
        if count > len(source):
            raise NoRoom(f"{count} of {len(source)} English words")
        return self.stream.random.sample(source, count)

    def _list(self, count: int, common: int, others: int) -> tuple[str, list[str]]:
        """The numbered list, and the common words."""
        words = self._words(count)
        first, rest = words[: self.num_common], words[self.num_common :]
        entries = first * common + rest * others
        self.bench.fixed_order().shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1)), first

    def draw(self, index: int, units: int) -> Rendered:
        settings, template, prefix = self.task.settings, self.task.template, self.task.answer_prefix
        repeats = (settings["common_repeats"], settings["uncommon_repeats"])
        context, answers = self._list(*(SMALL_EXAMPLE if self.small else EXAMPLE))
        solved, _, _ = self.bench.render(template, prefix, context, {})
        solution = " ".join(f"{i}. {word}" for i, word in enumerate(answers, start=1))
        context, answers = self._list(units, *(SMALL_REPEATS if self.small else repeats))
        before = f"{solved}{prefix} {solution}\n"
        prompt, prefix, start = self.bench.render(template, prefix, context, {})
        # Each of the two turns has its BOS.
        return Rendered(before + prompt, prefix, answers, len(before) + start)


class FrequentWordsGenerator(Generator):
    """Coded words by a zeta distribution; the size found first is kept, and shrinks by steps."""

    estimate_units = 0

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int) -> None:
        super().__init__(bench, task, context_length)
        from scipy.special import zeta

        self.limit = context_length - task.max_new_tokens
        self.step = self.limit // STEPS
        self.alpha: float = task.settings["alpha"]
        self._norm = zeta(self.alpha)
        if self.limit // TOKENS_PER_WORD <= NUM_ANSWERS:
            raise DoesNotFit((NUM_ANSWERS + 1) * TOKENS_PER_WORD)

    def _vocabulary(self) -> list[str]:
        def word() -> str:
            return "".join(self.stream.random.choices(string.ascii_lowercase, k=CODED_LETTERS))

        size = self.limit // TOKENS_PER_WORD
        words = [word() for _ in range(size)]
        while len(set(words)) < size:
            words.append(word())
        words = sorted(set(words))
        self.bench.fixed_order().shuffle(words)
        return [NOISE_WORD, *words[1:]]

    def _rendered(self, vocabulary: list[str], units: int) -> tuple[Rendered, int]:
        ranks = np.arange(1, len(vocabulary) + 1)
        counts = (units * (ranks**-self.alpha) / self._norm).astype(int)
        words = [w for word, n in zip(vocabulary, counts, strict=True) for w in [word] * n]
        self.bench.fixed_order().shuffle(words)
        prompt, prefix, start = self.bench.render(
            self.task.template, self.task.answer_prefix, " ".join(words), {}
        )
        answers = vocabulary[1 : 1 + NUM_ANSWERS]
        return Rendered(prompt, prefix, answers, start), self.count(prompt + prefix)

    @cached_property
    def units(self) -> int:
        """The last size in steps whose text is shorter than the limit."""
        vocabulary, units = self._vocabulary(), self.limit // CODED_LETTERS
        while self._rendered(vocabulary, units)[1] < self.limit:
            units += self.step
        return units - self.step

    def make(self, index: int) -> tuple[Rendered, int]:
        units, vocabulary = self.units, self._vocabulary()
        while units > 0:
            rendered, tokens = self._rendered(vocabulary, units)
            if tokens <= self.limit:
                return rendered, tokens
            units -= self.step
        raise DoesNotFit(self.limit + 1)

    def draw(self, index: int, units: int) -> Rendered:
        return self._rendered(self._vocabulary(), units)[0]
