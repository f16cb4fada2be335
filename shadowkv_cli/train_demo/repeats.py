"""Rows of random spans, each seen twice: looking back at what came before is learned from them."""

from __future__ import annotations

from array import array

from shadowkv_cli.train_demo.drawing import Desk, Request, Row
from shadowkv_cli.train_demo.pieces import Ids

SPANS = (8, 12, 24, 48)
GIVEN = 2
"""Ids of a span's second sight that are given; from small alphabets more are needed."""
GIVEN_SMALL = 4


def repeat_row(desk: Desk, request: Request) -> Row:
    """Spans of words, of digits among words, or of digits and few letters, then all once more.

    Not text, so it is not what a tokenizer would make; the ids are any but the special ones.
    """
    pieces, rng = desk.pieces, desk.rng
    length = rng.choice(SPANS)
    kind = rng.random()
    digits = [pieces(d)[0] for d in "0123456789"]
    special = 1 + max(pieces.bos, pieces.eos, pieces.pad)
    small = kind < 0.3
    if small:
        length = max(length, 12)
    hexadecimal = [*digits, *(pieces(c)[0] for c in "abcdef-")]
    share = 0.0 if small else rng.choice((0.0, 0.3, 0.6))

    def draw() -> Ids:
        if small:
            return rng.choices(hexadecimal, k=length)
        return [
            rng.choice(digits) if rng.random() < share else rng.randrange(special, pieces.size)
            for _ in range(length)
        ]

    count = max((request.length - 1) // (2 * length), 1)
    spans = [draw() for _ in range(count)]
    row = Row(request.task)
    row.ids = array("H", [pieces.bos])
    for span in spans:
        row.ids.extend(span)
    given = GIVEN_SMALL if small else GIVEN
    for span in rng.sample(spans, count):
        row.ids.extend(span[:given])
        row.answer([(span[given:], 0)])
    return row
