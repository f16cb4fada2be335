"""Variable tracking in RULER's order of draws, with an example that is renamed in every sample."""

from __future__ import annotations

import string
from dataclasses import replace

from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.tasks.ruler.definitions import TaskDefinition
from shadowkv_cli.tasks.ruler.draws import SMALL_LENGTH, Rendered, Workbench
from shadowkv_cli.tasks.ruler.fit import DoesNotFit
from shadowkv_cli.tasks.ruler.official.search import Generator, NoRoom
from shadowkv_cli.tasks.ruler.official.stream import Stream
from shadowkv_cli.tasks.ruler.variable_tracking import EXAMPLE_STEP, EXAMPLE_TOKENS, Chain

LINE_STEP = 10
SMALL_LINE_STEP = 5
PLACEHOLDER = "12345"
"""Value of the example until a sample takes it over."""
VALUES = (10_000, 99_999)
"""The upper bound is exclusive."""


def draw_chain(stream: Stream, count: int, letters: int, value: str | None) -> Chain:
    """Names, then a value unless there is one. Raises NoRoom where two names are the same."""

    def name() -> str:
        return "".join(stream.random.choices(string.ascii_uppercase, k=letters))

    names = [name() for _ in range(count)]
    distinct = len(set(names)) == count
    while len(set(names)) < count:
        names.append(name())
    # RULER takes names left over for a chain of their own, draws its value, and fails.
    drawn = value or str(stream.numbers.randint(*VALUES))
    if not distinct:
        if value is None:
            stream.numbers.randint(*VALUES)
        raise NoRoom("two variables have one name")
    return Chain(tuple(names), drawn)


def hide_chain(stream: Stream, chain: Chain, lines: int) -> str:
    """The chain at random places of so many lines of noise. Raises NoRoom."""
    if len(chain.names) > lines:
        raise NoRoom(f"{len(chain.names)} assignments in {lines} lines")
    return chain.among(lines, stream.random.sample(range(lines), len(chain.names)))


class ExampleGenerator(Generator):
    """The example in context: a file of one sample of 500 tokens without a chat template."""

    step = EXAMPLE_STEP
    estimate_units = EXAMPLE_STEP

    def __init__(self, bench: Workbench, task: TaskDefinition, stream: Stream) -> None:
        super().__init__(bench, task, EXAMPLE_TOKENS)
        self.stream = stream

    def draw(self, index: int, units: int) -> Rendered:
        chain = draw_chain(self.stream, self.task.settings["hops"] + 1, 3, PLACEHOLDER)
        fields = {"query": chain.value, "num_v": len(chain.names)}
        text = self.task.template + self.task.answer_prefix
        context = hide_chain(self.stream, chain, units)
        filled = text.format(context=context, **fields)
        return Rendered(filled, "", list(chain.names), 0)

    def example(self) -> str:
        """The solved example, which no answer has to fit behind."""
        rendered, _ = self.make(0)
        return f"{rendered.prompt} {' '.join(rendered.references)}\n"


class ChainGenerator(Generator):
    """One chain in noise, behind the example; units are lines."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int) -> None:
        super().__init__(bench, task, context_length)
        self.step = SMALL_LINE_STEP if context_length < SMALL_LENGTH else LINE_STEP
        self.estimate_units = self.step
        self.num_names = task.settings["hops"] + 1
        try:
            unanswered = replace(task, max_new_tokens=0)
            self._example = ExampleGenerator(bench, unanswered, self.stream).example()
        except DoesNotFit:
            raise ShadowKVError(
                f"RULER's example of vt has at most {EXAMPLE_TOKENS} tokens, which this tokenizer "
                "cannot keep to: leave out --fit official, or vt."
            ) from None
        self.example_tokens = self.count(self._example)

    def _renamed(self) -> str:
        """The example with new names, one after the other in the whole text, and a new value."""
        text = self._example
        for name in text.split()[-self.num_names :]:
            text = text.replace(
                name, "".join(self.stream.random.choices(string.ascii_uppercase, k=len(name)))
            )
        return text.replace(PLACEHOLDER, str(self.stream.numbers.randint(*VALUES)))

    def _rendered(self, units: int, *, with_example: bool) -> Rendered:
        chain = draw_chain(self.stream, self.num_names, 5, None)
        context = hide_chain(self.stream, chain, units)
        fields = {"query": chain.value, "num_v": len(chain.names)}
        template, prefix = self.task.template, self.task.answer_prefix
        example = f"{self._renamed()}\n" if with_example else ""
        prompt, prefix, start = self.bench.render(
            template, prefix, context, fields, example=example
        )
        return Rendered(prompt, prefix, list(chain.names), start)

    def draw(self, index: int, units: int) -> Rendered:
        return self._rendered(units, with_example=True)

    def draw_to_measure(self, units: int) -> str:
        rendered = self._rendered(units, with_example=False)
        return rendered.prompt + rendered.answer_prefix
