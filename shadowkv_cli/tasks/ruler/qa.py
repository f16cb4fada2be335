"""Question answering among distractor documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.ruler.definitions import TaskDefinition, constants
from shadowkv_cli.tasks.ruler.draws import Draw, Rendered, Workbench
from shadowkv_cli.tasks.ruler.gold import gold_fractions, gold_places
from shadowkv_cli.tasks.ruler.qa_corpus import QACorpus, QAItem


def question(bench: Workbench, task: TaskDefinition, index: int) -> tuple[QACorpus, QAItem]:
    """A task's corpus and its question `index`. Raises UsageError where there are fewer."""
    corpus = bench.sources.qa(task.settings["dataset"])
    if index >= corpus.num_questions:
        raise UsageError(
            f"{task.name} has {corpus.num_questions} questions in {corpus.name}: "
            f"use --num-samples {corpus.num_questions} or less."
        )
    return corpus, corpus.item(index)


def numbered(documents: Iterable[str]) -> str:
    """Documents as they stand in the prompt."""
    form = constants()["document"]
    return "\n\n".join(form.format(i=i, document=text) for i, text in enumerate(documents, 1))


def ask(
    bench: Workbench, task: TaskDefinition, corpus: QACorpus, item: QAItem, numbers: Sequence[int]
) -> Rendered:
    """The question behind the documents of these numbers, in this order."""
    prompt, prefix, start = bench.render(
        task.template,
        task.answer_prefix,
        numbered(corpus.document(number) for number in numbers),
        {"query": item.question},
    )
    gold = gold_places(numbers, item.gold_or_own)
    answers = list(item.answers)
    return Rendered(prompt, prefix, answers, start, gold_documents=gold, num_documents=len(numbers))


class DocumentsDraw(Draw):
    """Question i of the set, the order in which documents join, and where each would stand.

    RULER shuffles with a fixed seed, so that the gold document stands at the same place in every
    prompt of one size. Here every document has a random key of its own and they are sorted by it:
    a fresh uniform order per sample that keeps its shape when a document joins. With
    `shuffle_gold` the keys of the gold documents are spread evenly over the samples.
    """

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        super().__init__(bench, task, context_length, index)
        self.corpus, self.item = question(bench, task, index)
        self.min_units = len(self.item.own)
        rng = self.rng("documents")
        self._rng = rng
        self._documents = [*self.item.own, *rng.sample(self.item.more, len(self.item.more))]
        self._keys = [rng.random() for _ in self._documents]
        if bench.variant.shuffle_gold:
            gold = self.item.gold_or_own
            stream = f"{task.name}/{context_length}"
            spread = gold_fractions(bench.seed, stream, index, len(gold))
            for number, fraction in zip(gold, spread, strict=True):
                self._keys[self._documents.index(number)] = fraction
        self._used = set(self._documents)
        self._characters = [0]

    def _extend(self, units: int) -> None:
        """Draw more documents, each once before any is repeated."""
        while len(self._documents) < units:
            if len(self._used) >= self.corpus.num_documents:
                self._used = set()
            number = self._rng.randrange(self.corpus.num_documents)
            if number in self._used:
                continue
            self._used.add(number)
            self._documents.append(number)
            self._keys.append(self._rng.random())

    def render(self, units: int) -> Rendered:
        self._extend(units)
        order = sorted(range(units), key=lambda j: self._keys[j])
        numbers = [self._documents[j] for j in order]
        return ask(self.bench, self.task, self.corpus, self.item, numbers)

    def fixed_tokens(self) -> int:
        return self.bench.counter.total([self.item.question])

    def estimate(self, units: int) -> float:
        """Characters: documents are counted in tokens only near the limit."""
        self._extend(units)
        for number in self._documents[len(self._characters) - 1 : units]:
            size = len(self.corpus.document(number)) + len("\n\nDocument 100:\n")
            self._characters.append(self._characters[-1] + size)
        return self._characters[units]

    def tokens_between(self, low: int, high: int, scale: float) -> float:
        first, last = sorted((low, high))
        self._extend(last)
        texts = [
            "\n\n" + constants()["document"].format(i=i + 1, document=self.corpus.document(number))
            for i, number in enumerate(self._documents[first:last], start=first)
        ]
        tokens = self.bench.counter.total(texts)
        return tokens if high >= low else -tokens
