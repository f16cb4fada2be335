"""Variable tracking: one chain of assignments hidden in noise, after an example in context."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable
from dataclasses import dataclass

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition, constants
from shadowkv_cli.tasks.ruler.draws import Draw, Rendered, Workbench, distinct_positions

EXAMPLE_TOKENS = 500
"""The example is the longest of its kind that RULER's search finds below this many tokens."""
EXAMPLE_STEP = 5
EXAMPLE_MAX_LINES = 100


@dataclass(frozen=True)
class Chain:
    """Names that all hold one value: the first is assigned it, each next one copies the last."""

    names: tuple[str, ...]
    value: str

    @classmethod
    def draw(cls, rng: random.Random, count: int, letters: int) -> Chain:
        names: dict[str, None] = {}
        while len(names) < count:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        # The upper bound is exclusive, as numpy's is.
        return cls(tuple(names), str(rng.randrange(10_000, 99_999)))

    def statements(self) -> list[str]:
        """One line each; RULER ends a copy with a space."""
        lines = [f"VAR {self.names[0]} = {self.value}"]
        for before, name in zip(self.names, self.names[1:], strict=False):
            lines.append(f"VAR {name} = VAR {before} ")
        return lines

    def context(self, noise_lines: int, fractions: list[float]) -> str:
        """The statements, in order, among that many lines of noise."""
        return self.among(noise_lines, distinct_positions(fractions, noise_lines))

    def among(self, noise_lines: int, places: Iterable[int]) -> str:
        """The same at given places: numbers of the lines before which the statements stand."""
        lines = [constants()["noise"]] * noise_lines
        places = sorted(places)
        for offset, (place, statement) in enumerate(zip(places, self.statements(), strict=True)):
            lines.insert(place + offset, statement)
        return "\n".join(lines).replace(". \n", ".\n")


class ChainDraw(Draw):
    """The chain, its places in the noise, and the names and value of the example."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        super().__init__(bench, task, context_length, index)
        assert task.settings["chains"] == 1, "RULER's vt has one chain"
        count = task.settings["hops"] + 1
        rng = self.rng("chain")
        self.chain = Chain.draw(rng, count, letters=5)
        self._fractions = [rng.random() for _ in range(count)]
        self.example = self._example(Chain.draw(self._example_rng(), count, letters=3))
        self.min_units = count + 1

    def _example_rng(self) -> random.Random:
        """What the names and the value of the example are drawn from."""
        return self.rng("example")

    def _context(self, chain: Chain, noise_lines: int, fractions: list[float]) -> str:
        return chain.context(noise_lines, fractions)

    def _example_text(self) -> str:
        """The task's text around the example's context, with its answer prefix."""
        return self.task.template + self.task.answer_prefix

    def _fields(self, chain: Chain) -> dict[str, str]:
        return {"query": chain.value, "num_v": str(len(chain.names))}

    def _example(self, chain: Chain) -> str:
        """A solved example: the same noise and places in all samples, but other names and value."""
        if self.bench.example_lines is None:
            self.bench.example_lines = self._longest_example()
        text = self._example_question(chain, self.bench.example_lines)
        return f"{text} {' '.join(chain.names)}\n\n"

    def _example_question(self, chain: Chain, noise_lines: int) -> str:
        rng = self.bench.fixed_order()
        context = self._context(chain, noise_lines, [rng.random() for _ in chain.names])
        return self._example_text().format(context=context, **self._fields(chain))

    def _longest_example(self) -> int:
        """Lines of noise in the example: RULER's search in steps of 5, with placeholder names."""
        names = tuple(3 * letter for letter in string.ascii_uppercase)
        chain = Chain(names[: len(self.chain.names)], "12345")
        lines = 2 * EXAMPLE_STEP
        for more in range(lines, EXAMPLE_MAX_LINES, EXAMPLE_STEP):
            if self.bench.counter.total([self._example_question(chain, more)]) > EXAMPLE_TOKENS:
                break
            lines = more
        return lines

    def render(self, units: int) -> Rendered:
        prompt, prefix, start = self.bench.render(
            self.task.template,
            self.task.answer_prefix,
            self._context(self.chain, units, self._fractions),
            self._fields(self.chain),
            example=self.example,
        )
        return Rendered(prompt, prefix, list(self.chain.names), start)

    def fixed_tokens(self) -> int:
        return self.bench.counter.total(
            [self.example, *(f"\n{line}" for line in self.chain.statements())]
        )

    def estimate(self, units: int) -> float:
        return units
