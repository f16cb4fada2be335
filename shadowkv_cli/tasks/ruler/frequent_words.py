"""Frequent words extraction: made-up words whose counts follow a zeta distribution."""

from __future__ import annotations

import string
from math import ceil

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition
from shadowkv_cli.tasks.ruler.draws import Draw, Rendered, Workbench

TOKENS_PER_WORD = 50
"""The vocabulary has one word per this many tokens of the context."""
NOISE_WORD = "..."
NUM_ANSWERS = 3


class FrequentWordsDraw(Draw):
    """A vocabulary by rank; the unit is one step of N, the total that the counts are shares of."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        super().__init__(bench, task, context_length, index)
        from scipy.special import zeta

        self.alpha: float = task.settings["alpha"]
        self._norm = float(zeta(self.alpha))
        room = context_length - task.max_new_tokens - self.base_tokens
        # Five ranks at least: the noise, the three answers and one word below them.
        size = max(room // TOKENS_PER_WORD, NUM_ANSWERS + 2)
        rng = self.rng("vocabulary")
        words: dict[str, None] = {}
        while len(words) < size:
            words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        vocabulary = sorted(words)
        bench.fixed_order().shuffle(vocabulary)
        vocabulary[0] = NOISE_WORD
        self.vocabulary = vocabulary
        # From here on the third answer is more frequent than every word below it.
        last, below = NUM_ANSWERS + 1, NUM_ANSWERS + 2
        self.min_units = ceil(self._norm / (last**-self.alpha - below**-self.alpha))

    def counts(self, units: int) -> list[int]:
        """How often each rank stands in the text, without the ranks that do not."""
        counts = []
        for rank in range(1, len(self.vocabulary) + 1):
            count = int(units * rank**-self.alpha / self._norm)
            if count == 0:
                break
            counts.append(count)
        return counts

    def render(self, units: int) -> Rendered:
        words = []
        for word, count in zip(self.vocabulary, self.counts(units), strict=False):
            words += [word] * count
        self.bench.fixed_order().shuffle(words)
        prompt, prefix, start = self.bench.render(
            self.task.template, self.task.answer_prefix, " ".join(words), {}
        )
        return Rendered(prompt, prefix, self.vocabulary[1 : 1 + NUM_ANSWERS], start)

    def estimate(self, units: int) -> float:
        counts = self.counts(units)
        words = [f" {word}" for word in self.vocabulary[: len(counts)]]
        sizes = self.bench.counter.counts(words)
        return sum(count * size for count, size in zip(counts, sizes, strict=True))
