"""Questions in RULER's order of draws: other documents only, all in one fixed order."""

from __future__ import annotations

from shadowkv_cli.tasks.ruler.draws import Rendered
from shadowkv_cli.tasks.ruler.gold import gold_fractions, moved
from shadowkv_cli.tasks.ruler.official.search import Generator, NoRoom
from shadowkv_cli.tasks.ruler.qa import ask, question

DOCUMENT_STEP = 10


class DocumentsGenerator(Generator):
    """Question i of the file among so many documents."""

    step = DOCUMENT_STEP
    estimate_units = DOCUMENT_STEP

    def draw(self, index: int, units: int) -> Rendered:
        corpus, item = question(self.bench, self.task, index)
        own, more = list(item.own), list(item.more)
        missing = units - len(own)
        if units >= corpus.num_documents:
            numbers = [i % corpus.num_documents for i in range(units)]
        elif missing > len(more):
            used = {*own, *more}
            others = [i for i in range(corpus.num_documents) if i not in used]
            numbers = own + more + self.stream.random.sample(others, missing - len(more))
        elif missing < 0:
            raise NoRoom(f"{len(own)} documents of the question in {units}")
        else:
            numbers = own + self.stream.random.sample(more, missing)
        self.bench.fixed_order().shuffle(numbers)
        if self.bench.variant.shuffle_gold:
            gold, stream = item.gold_or_own, f"{self.task.name}/{self.context_length}"
            spread = gold_fractions(self.bench.seed, stream, index, len(gold))
            numbers = moved(numbers, gold, spread)
        return ask(self.bench, self.task, corpus, item, numbers)
