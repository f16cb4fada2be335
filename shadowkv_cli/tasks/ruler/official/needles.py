"""Needles in RULER's order of draws: keys and values, lines, places, queries."""

from __future__ import annotations

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition, constants
from shadowkv_cli.tasks.ruler.draws import SMALL_LENGTH, Rendered, Workbench
from shadowkv_cli.tasks.ruler.niah import DEPTHS, fill_needles, join_queries, needle_line
from shadowkv_cli.tasks.ruler.official.search import Generator, NoRoom
from shadowkv_cli.tasks.ruler.sentences import available_splitter, split_sentences

WORD_STEP = 500
LINE_STEP = 25
SMALL_LINE_STEP = 5


class NeedleGenerator(Generator):
    """The eight needle tasks; units are words of the essays, or lines."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int) -> None:
        super().__init__(bench, task, context_length)
        self.haystack: str = task.settings["haystack"]
        lines = SMALL_LINE_STEP if context_length < SMALL_LENGTH else LINE_STEP
        self.step = WORD_STEP if self.haystack == "essay" else lines
        self.estimate_units = self.step
        self._split: dict[int, list[str]] = {}

    def _sentences(self, words: int) -> list[str]:
        """The sentences of the first words of the corpus, over and over; kept for the last size."""
        if words not in self._split:
            sources = self.bench.sources
            if sources.essay_text is None:
                chosen = sources.essay.words(words)
            else:
                corpus = sources.essay_text.split(" ")
                chosen = (corpus * -(-words // len(corpus)))[:words]
            splitter = sources.sentence_splitter or available_splitter()
            self._split = {words: split_sentences(" ".join(chosen).strip(), splitter)}
        return self._split[words]

    def _in_essay(self, units: int, needles: list[str]) -> tuple[str, list[float]]:
        sentences = self._sentences(units)
        depths = sorted(self.stream.random.sample(DEPTHS, len(needles)))
        parts, last = [], 0
        for depth, needle in zip(depths, needles, strict=True):
            place = int(len(sentences) * (depth / 100))
            parts += [" ".join(sentences[last:place]), needle]
            last = place
        return " ".join([*parts, " ".join(sentences[last:])]), [float(d) for d in depths]

    def _in_lines(self, units: int, needles: list[str]) -> tuple[str, list[float]]:
        kinds = self.task.settings["key_type"], self.task.settings["value_type"]
        if self.haystack == "noise":
            lines = [constants()["noise"]] * units
        else:
            # Key before value, line by line.
            pairs = [[self.stream.value(kind) for kind in kinds] for _ in range(units)]
            lines = [needle_line(self.task, key, value) for key, value in pairs]
        if len(needles) > units:
            raise NoRoom(f"{len(needles)} needles in {units} lines")
        places = sorted(self.stream.random.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines), [round(100 * place / units, 2) for place in places]

    def draw(self, index: int, units: int) -> Rendered:
        settings = self.task.settings
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(max(settings["keys"], settings["queries"])):
            keys.append(self.stream.value(settings["key_type"]))
            kind = settings["value_type"]
            values.append([self.stream.value(kind) for _ in range(settings["values"])])
        needles = [
            (k, needle_line(self.task, key, v)) for k, key in enumerate(keys) for v in values[k]
        ]
        self.bench.fixed_order().shuffle(needles)
        hide = self._in_essay if self.haystack == "essay" else self._in_lines
        context, depths = hide(units, [line for _, line in needles])
        asked = self.stream.random.sample(range(len(keys)), settings["queries"])
        query = join_queries([keys[k] for k in asked])
        prompt, prefix, start = fill_needles(self.bench, self.task, context, query)
        own = sorted(d for d, (k, _) in zip(depths, needles, strict=True) if k in asked)
        return Rendered(prompt, prefix, [v for k in asked for v in values[k]], start, own)
