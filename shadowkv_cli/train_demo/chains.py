"""Rows of variable tracking."""

from __future__ import annotations

import random
import string
from array import array

from shadowkv_cli.tasks.ruler.definitions import constants, definitions
from shadowkv_cli.train_demo.drawing import Desk, Request, Row
from shadowkv_cli.train_demo.pieces import Ids, Pieces

EXAMPLE_LINES = 10
"""Lines of noise in the solved example: what the generator finds for this tokenizer."""
LETTERS, EXAMPLE_LETTERS = 5, 3
HOPS = 4
NAME_LOOKUPS = 2
SMALLEST_WITH_EXAMPLE = 512


class Chain:
    """Names of one value, each with the space in front, and its statements as lines."""

    def __init__(self, desk: Desk, count: int, letters: int) -> None:
        pieces, rng = desk.pieces, desk.rng
        names: dict[str, None] = {}
        while len(names) < count:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        self.names = [pieces.fresh(f" {name}") for name in names]
        self.value = number_ids(pieces, rng.randrange(10_000, 99_999))
        variable, equals, copy = pieces("\nVAR"), pieces(" ="), pieces(" = VAR")
        space = pieces(" ")
        self.lines: list[Ids] = [[*variable, *self.names[0], *equals, *self.value]]
        for before, name in zip(self.names, self.names[1:], strict=False):
            self.lines.append([*variable, *name, *copy, *before, *space])

    def among(self, noise: Ids, count: int, rng: random.Random) -> array[int]:
        """The statements in order among that many lines of noise."""
        places = sorted(rng.randrange(count + 1) for _ in self.lines)
        result = array("H")
        last = 0
        for place, line in zip(places, self.lines, strict=True):
            result.extend(noise * (place - last))
            result.extend(line)
            last = place
        result.extend(noise * (count - last))
        return result


def number_ids(pieces: Pieces, number: int) -> Ids:
    """A number behind a space."""
    return [*pieces(" "), *(i for digit in str(number) for i in pieces(digit))]


def chain_row(desk: Desk, request: Request) -> Row:
    """A row of `vt`; one that is not exact has fewer hops and a shorter example, or none."""
    pieces, rng = desk.pieces, desk.rng
    task = definitions()[request.task]
    head, tail = task.template.split("{context}")
    opening, newline = pieces(head.rstrip("\n")), pieces("\n")
    question, question_end = (pieces(part) for part in tail.split(" {query}"))
    answer, rest = task.answer_prefix.split(" {num_v}")
    middle, answer_end = rest.split(" {query}")
    space = pieces(" ")
    noise = pieces("\n" + constants()["noise"])

    def ask(chain: Chain) -> Ids:
        count = number_ids(pieces, len(chain.names))
        asked = [*question, *chain.value, *question_end, *pieces(answer), *count]
        return [*asked, *pieces(middle), *chain.value, *pieces(answer_end.rstrip(" ")), *space]

    count = 1 + (HOPS if request.exact else rng.randint(1, HOPS))
    row = Row(request.task)
    row.ids.append(pieces.bos)
    example_lines = EXAMPLE_LINES if request.exact else rng.choice((-1, 0, 2, 5))
    if request.length < SMALLEST_WITH_EXAMPLE:
        example_lines = -1
    if example_lines >= 0:
        example = Chain(desk, count, EXAMPLE_LETTERS)
        row.add(opening, newline, example.among(noise, example_lines, rng), ask(example))
        for name in example.names:
            row.add(name)
        row.add(newline, newline)
    row.add(opening, newline)
    chain = Chain(desk, count, LETTERS)
    closing = Row(request.task)
    closing.add(ask(chain))
    closing.answer([(name, NAME_LOOKUPS) for name in chain.names])
    closing.end(pieces.eos)
    room = request.length - len(row.ids) - len(closing.ids) - sum(map(len, chain.lines))
    row.add(chain.among(noise, max(room // len(noise), 0), rng))
    row.join(closing)
    return row
