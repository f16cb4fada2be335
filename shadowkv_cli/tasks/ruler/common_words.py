"""Common words extraction: a numbered list in which ten words stand more often than the others."""

from __future__ import annotations

from functools import cached_property

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition
from shadowkv_cli.tasks.ruler.draws import SMALL_LENGTH, Draw, Rendered, Workbench
from shadowkv_cli.tasks.ruler.words import WordDraw, common_word_pool

EXAMPLE = (40, 10, 3)
"""Distinct words, repeats of the common ones, repeats of the others in the one-shot example."""
SMALL_EXAMPLE = (20, 3, 1)
SMALL_REPEATS = (6, 1)
"""Repeats of common and other words below 4,096 tokens."""


class CommonWordsDraw(Draw):
    """An endless sequence of distinct words, the first ten the common ones, and the example's."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        super().__init__(bench, task, context_length, index)
        small = context_length < SMALL_LENGTH
        settings = task.settings
        self.num_common: int = settings["common_words"]
        self.repeats = (
            SMALL_REPEATS if small else (settings["common_repeats"], settings["uncommon_repeats"])
        )
        self._words = WordDraw(self.rng("words"))
        self._size, *repeats = SMALL_EXAMPLE if small else EXAMPLE
        self._example_repeats = (repeats[0], repeats[1])
        self._word_sums = [0]
        self.min_units = self.num_common + 1

    def _entries(self, words: list[str], repeats: tuple[int, int]) -> str:
        """The numbered list: every word as often as it should stand, in RULER's fixed order."""
        common, others = words[: self.num_common], words[self.num_common :]
        entries = common * repeats[0] + others * repeats[1]
        self.bench.fixed_order().shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))

    @cached_property
    def _turn_before(self) -> str:
        """The one-shot example as a whole turn with its answer; it alone has the BOS."""
        words = self.rng("example").sample(common_word_pool(), self._size)
        fields = {"context": self._entries(words, self._example_repeats)}
        turn = self.bench.wrapper.wrap(self.task.template.format(**fields))
        answer = " ".join(f"{i}. {w}" for i, w in enumerate(words[: self.num_common], start=1))
        return f"{turn}{self.task.answer_prefix} {answer}\n"

    def render(self, units: int) -> Rendered:
        words = self._words.first(units)
        prompt, prefix, start = self.bench.render(
            self.task.template,
            self.task.answer_prefix,
            self._entries(words, self.repeats),
            {},
            turn_before=self._turn_before,
        )
        return Rendered(prompt, prefix, words[: self.num_common], start)

    def fixed_tokens(self) -> int:
        return self.bench.counter.total([self._turn_before])

    def estimate(self, units: int) -> float:
        sums = self._word_sums
        if len(sums) <= units:
            new = self._words.first(units)[len(sums) - 1 :]
            for count in self.bench.counter.counts(f" {word}" for word in new):
                sums.append(sums[-1] + count)
        often, seldom = self.repeats
        common = min(units, self.num_common)
        words = often * sums[common] + seldom * (sums[units] - sums[common])
        entries = often * common + seldom * (units - common)
        return words + self.bench.number_tokens(entries)
