"""The rows of one task and length in RULER's order."""

from __future__ import annotations

from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.ruler.definitions import definitions
from shadowkv_cli.tasks.ruler.draws import Workbench
from shadowkv_cli.tasks.ruler.fit import DoesNotFit
from shadowkv_cli.tasks.ruler.official.chains import ChainGenerator
from shadowkv_cli.tasks.ruler.official.documents import DocumentsGenerator
from shadowkv_cli.tasks.ruler.official.needles import NeedleGenerator
from shadowkv_cli.tasks.ruler.official.search import Generator
from shadowkv_cli.tasks.ruler.official.words import CommonWordsGenerator, FrequentWordsGenerator
from shadowkv_cli.tasks.ruler.qa import question
from shadowkv_cli.tasks.ruler.samples import finished, too_short
from shadowkv_cli.tasks.tokenization import tokens_in_front

GENERATORS: dict[str, type[Generator]] = {
    "niah": NeedleGenerator,
    "variable_tracking": ChainGenerator,
    "common_words": CommonWordsGenerator,
    "frequent_words": FrequentWordsGenerator,
    "qa": DocumentsGenerator,
}


class Series:
    """Samples one after the other; those before a row that is asked for are made again."""

    def __init__(self, bench: Workbench, task: str, context_length: int, num_samples: int) -> None:
        """Search the size of that many samples.

        Raises UsageError for a length that cannot hold the first, and for too few questions.
        """
        self.bench = bench
        self.task = definitions()[task]
        if self.task.family == "qa":
            question(bench, self.task, num_samples - 1)
        self.context_length = context_length
        try:
            self._generator = GENERATORS[self.task.family](bench, self.task, context_length)
        except DoesNotFit as error:
            raise too_short(task, context_length, 0, error) from None
        self._made = -1
        self.sample(0)

    def sample(self, index: int) -> Sample:
        """Row `index`: the last one again, or any later. Raises UsageError where it cannot fit."""
        while self._made < index:
            self._last = self._next(self._made + 1)
            self._made += 1
        assert self._made == index, f"row {index} was made before"
        return self._last

    def _next(self, index: int) -> Sample:
        try:
            rendered, tokens = self._generator.make(index)
        except DoesNotFit as error:
            raise too_short(self.task.name, self.context_length, index, error) from None
        extra = tokens_in_front(self.bench.tokenizer, rendered.prompt)
        return finished(self.task, self.context_length, index, rendered, tokens + extra, extra)
