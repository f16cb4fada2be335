"""Needle in a haystack: eight tasks over essays, repeated noise, or other needles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition, constants
from shadowkv_cli.tasks.ruler.draws import Draw, Rendered, Workbench, distinct_positions
from shadowkv_cli.tasks.ruler.words import random_value

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Depths of needles in essays, in percent: 40 from 0 to 100, evenly spaced."""


def singular(text: str) -> str:
    """RULER's rewrite for tasks with one answer; for the task's text, never a chat wrapper."""
    for plural, single in (
        ("Some", "A"),
        ("are all", "is"),
        ("are", "is"),
        ("answers", "answer"),
    ):
        text = text.replace(plural, single)
    return text


def needle_line(task: TaskDefinition, key: str, value: str) -> str:
    """The sentence that hides a value."""
    kind = task.settings["value_type"]
    line: str = constants()["needle"].format(type_needle_v=kind, key=key, value=value)
    return line


def join_queries(queries: Sequence[str]) -> str:
    """The keys as the question names them."""
    return queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"


def fill_needles(
    bench: Workbench, task: TaskDefinition, context: str, query: str
) -> tuple[str, str, int]:
    """The finished prompt around a context: (prompt, answer prefix, question start).

    In the dialect of ShadowKV's authors the rewrite reaches the chat template ("You is").
    """
    template, prefix, kind = task.template, task.answer_prefix, task.settings["value_type"]
    wrapper = bench.wrapper
    if task.settings["queries"] * task.settings["values"] == 1:
        template, prefix, kind = singular(template), singular(prefix), kind[:-1]
        if bench.variant.dialect == "shadowkv":
            before, after = singular(wrapper.before), singular(wrapper.after)
            wrapper = replace(wrapper, before=before, after=after)
    fields = {"type_needle_v": kind, "query": query}
    return bench.render(template, prefix, context, fields, wrapper=wrapper)


class NeedleDraw(Draw):
    """Keys, values, places and the query of one sample."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        super().__init__(bench, task, context_length, index)
        settings = task.settings
        self.haystack: str = settings["haystack"]
        num_keys = max(settings["keys"], settings["queries"])
        rng = self.rng("needles")
        keys: list[str] = []
        values: list[list[str]] = []
        while len(keys) < num_keys:
            key = random_value(settings["key_type"], rng)
            if key not in keys:
                keys.append(key)
                kind = settings["value_type"]
                values.append([random_value(kind, rng) for _ in range(settings["values"])])
        self.keys = keys
        needles = [(k, needle_line(task, key, v)) for k, key in enumerate(keys) for v in values[k]]
        bench.fixed_order().shuffle(needles)
        self.needles = [line for _, line in needles]
        asked = self.rng("query").sample(range(num_keys), settings["queries"])
        self.needle_is_asked = [k in asked for k, _ in needles]
        self.references = [value for k in asked for value in values[k]]
        self.query = join_queries([keys[k] for k in asked])
        places = self.rng("places")
        self._depths: list[float] = sorted(places.sample(DEPTHS, len(needles)))
        self._fractions = [places.random() for _ in needles]
        self._lines: list[str] = []
        self._line_rng = self.rng("lines")
        self.min_units = 1 if self.haystack == "essay" else len(needles)

    def _haystack_lines(self, count: int) -> list[str]:
        """The first lines of a haystack of noise or of needles with other keys."""
        if self.haystack == "noise":
            return [constants()["noise"]] * count
        settings = self.task.settings
        while len(self._lines) < count:
            key = random_value(settings["key_type"], self._line_rng)
            value = random_value(settings["value_type"], self._line_rng)
            if key not in self.keys:
                self._lines.append(needle_line(self.task, key, value))
        return self._lines[:count]

    def _context(self, units: int) -> tuple[str, list[float]]:
        """The haystack with its needles, and where each needle stands, in percent."""
        if self.haystack == "essay":
            essay = self.bench.sources.essay
            sentences = essay.num_sentences(units)
            places = [int(sentences * (depth / 100)) for depth in self._depths]
            parts = []
            last = 0
            for place, needle in zip(places, self.needles, strict=True):
                parts += [essay.text(last, place, units), needle]
                last = place
            parts.append(essay.text(last, sentences, units))
            return " ".join(parts), [float(depth) for depth in self._depths]
        lines = self._haystack_lines(units)
        # The first needle goes to the deepest place, and inserting there moves nothing above.
        places = sorted(distinct_positions(self._fractions, units), reverse=True)
        for place, needle in zip(places, self.needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines), [round(100 * place / units, 2) for place in places]

    def render(self, units: int) -> Rendered:
        context, depths = self._context(units)
        prompt, prefix, start = fill_needles(self.bench, self.task, context, self.query)
        asked = [d for d, wanted in zip(depths, self.needle_is_asked, strict=True) if wanted]
        return Rendered(prompt, prefix, list(self.references), start, sorted(asked))

    def estimate(self, units: int) -> float:
        if self.haystack == "essay":
            return self.bench.sources.essay.tokens(units, self.bench.counter)
        return units

    def fixed_tokens(self) -> int:
        return self.bench.counter.total(
            [*(f" {line}" for line in self.needles), *[f" {self.query}"] * 2]
        )

    def tokens_between(self, low: int, high: int, scale: float) -> float:
        if self.haystack != "needle":
            return super().tokens_between(low, high, scale)
        lines = self._haystack_lines(max(low, high))[min(low, high) :]
        tokens = self.bench.counter.total(f"\n{line}" for line in lines)
        return tokens if high >= low else -tokens
