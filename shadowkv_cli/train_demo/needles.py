"""Rows of the eight needle tasks, in RULER's words, and pairs: the same with less around it."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition, constants, definitions
from shadowkv_cli.tasks.ruler.niah import DEPTHS, singular
from shadowkv_cli.train_demo.drawing import LOOKUPS, Desk, Request, Row
from shadowkv_cli.train_demo.pieces import Ids, Pieces

MAX_NEEDLES = 48
MAX_QUESTIONS = 16
IDS_A_QUESTION = 1024
"""A dense row asks up to 16 questions, or one for each so many of its ids where that is more."""
NEEDLE_SHARE, QUESTION_SHARE = 0.3, 0.5
"""Shares of a dense row that its needles and its questions take at most."""


class Wording:
    """A task's text as pieces, cut where context, keys and values stand."""

    def __init__(self, pieces: Pieces, task: TaskDefinition) -> None:
        settings = task.settings
        kind = settings["value_type"]
        template, prefix = task.template, task.answer_prefix
        asked = kind
        self.single = settings["queries"] * settings["values"] == 1
        if self.single:
            template, prefix, asked = singular(template), singular(prefix), kind[:-1]
        head, tail = template.split("{context}")
        self.head = pieces(head.format(type_needle_v=asked).removesuffix("\n"))
        self.newline = pieces("\n")
        question, question_end = tail.split(" {query}")
        answer, answer_end = prefix.split(" {query}")
        self.question = pieces(question.format(type_needle_v=asked))
        self.question_end = pieces(question_end)
        self.answer = pieces(answer.format(type_needle_v=asked))
        self.answer_end = pieces(answer_end)
        self.asking = [*self.question, *self.question_end, *self.answer, *self.answer_end]
        before, rest = constants()["needle"].split(" {key}")
        middle, after = rest.split(" {value}")
        before = before.format(type_needle_v=kind)
        self.line = pieces(f"\n{before}")
        self.sentence = pieces(f" {before}")
        self.opening = pieces(before)
        self.middle, self.full_stop = pieces(middle), pieces(after)
        self.noise = pieces("\n" + constants()["noise"])
        self.comma, self.last_comma = pieces(","), pieces(", and")


_wordings: dict[str, Wording] = {}


def wording(pieces: Pieces, name: str) -> Wording:
    if name not in _wordings:
        _wordings[name] = Wording(pieces, definitions()[name])
    return _wordings[name]


class Needle:
    """A key and its value; `text` is the needle behind its first words."""

    def __init__(self, words: Wording, number: int, key: Ids, value: Ids) -> None:
        self.number = number
        self.key = key
        self.value = value
        self.text = [*key, *words.middle, *value, *words.full_stop]


def needle_row(desk: Desk, request: Request) -> Row:
    """A row of one of the eight tasks."""
    pieces, rng = desk.pieces, desk.rng
    words = wording(pieces, request.task)
    settings = definitions()[request.task].settings
    row = Row(request.task)
    row.add([pieces.bos], words.head)

    def draw_needle(number: int, key: Ids | None = None) -> Needle:
        own = pieces.value(settings["key_type"], rng)[1] if key is None else key
        return Needle(words, number, own, pieces.value(settings["value_type"], rng)[1])

    num_keys = max(settings["keys"], settings["queries"])
    num_questions = 1
    if not request.exact and words.single:
        one = draw_needle(0)
        each = len(words.line) + len(one.text)
        most = min(int(NEEDLE_SHARE * request.length / each), MAX_NEEDLES)
        num_keys = rng.randint(1, max(most, 1))
        each = len(words.asking) + 2 * len(one.key) + len(one.value)
        limit = max(MAX_QUESTIONS, request.length // IDS_A_QUESTION)
        most = min(int(QUESTION_SHARE * request.length / each), limit)
        num_questions = min(num_keys, max(most, 1))
    needles = []
    for number in range(num_keys):
        first = draw_needle(number)
        needles += [first, *(draw_needle(number, first.key) for _ in range(settings["values"] - 1))]
    rng.shuffle(needles)

    if words.single:
        asked = rng.sample(needles, num_questions)
        questions = [([needle.key], [needle]) for needle in asked]
    else:
        keys = {needle.number: needle.key for needle in needles}
        order = rng.sample(sorted(keys), settings["queries"])
        # Values are listed as they stand in the text: an order that can be learned.
        found = [needle for needle in needles if needle.number in order]
        questions = [([keys[k] for k in order], found)]
    closing = Row(request.task)
    for queries, answers in questions:
        _ask(closing, words, queries, answers)
    closing.end(pieces.eos)
    room = request.length - len(row.ids) - len(closing.ids)
    if settings["haystack"] == "essay":
        row.add(_essay(desk, words, needles, room, request.exact))
    else:
        row.add(_lines(desk, words, needles, room, settings["haystack"], draw_needle))
    row.join(closing)
    return row


def _ask(row: Row, words: Wording, queries: list[Ids], answers: list[Needle]) -> None:
    query = list(queries[0])
    for i, key in enumerate(queries[1:], start=2):
        query += words.last_comma if i == len(queries) else words.comma
        query += key
    row.add(words.question, query, words.question_end, words.answer, query, words.answer_end)
    parts: list[tuple[Ids, int]] = []
    for i, needle in enumerate(answers):
        if i:
            parts.append((words.comma, 0))
        parts.append((needle.value, LOOKUPS))
    row.answer([*parts, (words.full_stop, 0)])


def _lines(
    desk: Desk,
    words: Wording,
    needles: list[Needle],
    room: int,
    haystack: str,
    draw_needle: Callable[[int], Needle],
) -> array[int]:
    """Needles among lines of noise, or among needles with other keys."""
    rng = desk.rng
    result = array("H")
    lines: list[Ids] = [[*words.line, *needle.text] for needle in needles]
    room -= sum(map(len, lines))
    if haystack == "noise":
        filling = [words.noise] * max(room // len(words.noise), 0)
    else:
        filling = []
        while True:
            line = [*words.line, *draw_needle(-1).text]
            room -= len(line)
            if room < 0:
                break
            filling.append(line)
    places = sorted(rng.randrange(len(filling) + 1) for _ in lines)
    last = 0
    for place, line in zip(places, lines, strict=True):
        for filler in filling[last:place]:
            result.extend(filler)
        result.extend(line)
        last = place
    for filler in filling[last:]:
        result.extend(filler)
    return result


def _essay(desk: Desk, words: Wording, needles: list[Needle], room: int, exact: bool) -> array[int]:
    """Prose with needles between sentences, joined by single spaces as RULER does it."""
    space = desk.pieces(" ")
    room -= sum(len(words.sentence) + len(needle.text) for needle in needles)
    room -= len(needles) + 1  # a space for every part that can be empty
    room -= len(words.newline)
    passage = desk.pieces.prose.draw(desk.rng, room)
    sentences = len(passage.ends)
    if exact:
        depths = sorted(desk.rng.sample(DEPTHS, len(needles)))
        places = [int(sentences * (depth / 100)) for depth in depths]
    else:
        places = sorted(desk.rng.randrange(sentences + 1) for _ in needles)
    result = array("H", words.newline)
    starts = [0, *passage.ends]
    last = 0
    for i, place in enumerate([*places, sentences]):
        if place > last:
            if i == 0:
                opening = len(passage.opening) - len(passage.ids)
                result.extend(passage.opening[: starts[place] + opening])
            else:
                result.extend(passage.ids[starts[last] : starts[place]])
        elif i:
            result.extend(space)
        if i < len(places):
            result.extend(words.sentence)
            result.extend(needles[i].text)
        last = place
    return result


def pair_row(desk: Desk, request: Request) -> Row:
    """Keys next to values, asked again in another order: what looking up is learned from."""
    pieces, rng = desk.pieces, desk.rng
    words = wording(pieces, "niah_single_1")
    before = rng.randint(0, min(request.gap, len(words.middle)))
    after = rng.randint(0, min(request.gap, len(words.answer_end)))
    front: Ids = []
    asking: Ids = []
    if request.gap and rng.random() < 0.5:
        front, asking = words.sentence, words.answer
    key_kind = "uuids" if rng.random() < 0.2 else "words"
    value_kind = "uuids" if rng.random() < 0.2 else "numbers"
    row = Row(request.task)
    row.ids.append(pieces.bos)
    statements: list[tuple[Ids, Ids]] = []
    room = request.length - 1
    separator = words.full_stop
    while True:
        key, value = pieces.value(key_kind, rng)[1], pieces.value(value_kind, rng)[1]
        room -= len(front) + len(asking) + before + after
        room -= 2 * (len(key) + len(value) + len(separator))
        if room < 0:
            break
        statements.append((key, value))
    for key, value in statements:
        row.add(front, key, words.middle[:before], value, separator)
    end = words.answer_end[len(words.answer_end) - after :]
    for key, value in rng.sample(statements, len(statements)):
        row.add(asking, key, end)
        row.answer([(value, LOOKUPS), (separator, 0)])
    return row
