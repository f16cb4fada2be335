"""Rows of common and of frequent words."""

from __future__ import annotations

import string
from collections.abc import Iterable

from shadowkv_cli.tasks.ruler.common_words import EXAMPLE, SMALL_EXAMPLE, SMALL_REPEATS
from shadowkv_cli.tasks.ruler.definitions import definitions
from shadowkv_cli.tasks.ruler.draws import SMALL_LENGTH
from shadowkv_cli.tasks.ruler.frequent_words import NOISE_WORD, NUM_ANSWERS, TOKENS_PER_WORD
from shadowkv_cli.tasks.ruler.words import common_word_pool
from shadowkv_cli.train_demo.chains import number_ids
from shadowkv_cli.train_demo.drawing import Desk, Request, Row
from shadowkv_cli.train_demo.pieces import Ids, Pieces

WORD_LOOKUPS = 1
LABEL_TOKENS, LONG_LABEL_TOKENS = 5, 6
"""Tokens of a list's label at most: a space, the digits and a full stop."""


def common_words_row(desk: Desk, request: Request) -> Row:
    """A row of `cwe`; the common words are listed in the order in which they first appear."""
    pieces, rng = desk.pieces, desk.rng
    task = definitions()[request.task]
    settings = task.settings
    small = request.length < SMALL_LENGTH
    repeats = (settings["common_repeats"], settings["uncommon_repeats"])
    often, seldom = SMALL_REPEATS if small else repeats
    size, example_often, example_seldom = SMALL_EXAMPLE if small else EXAMPLE
    common = settings["common_words"]
    head, tail = task.template.split("{context}")
    opening = pieces(head.rstrip("\n"))
    asking = [*pieces(tail), *pieces(task.answer_prefix)]

    row = Row(request.task)
    words = rng.sample(common_word_pool(), size)
    row.add(
        [pieces.bos],
        opening,
        _numbered(pieces, _mix(desk, words, common, example_often, example_seldom), "\n"),
    )
    row.add(asking, _numbered(pieces, words[:common], " "), pieces("\n"))
    row.add(opening)

    pool = list(rng.sample(common_word_pool(), len(common_word_pool())))
    room = request.length - len(row.ids) - len(asking) - 1
    label = LABEL_TOKENS if request.length < 2 * SMALL_LENGTH else LONG_LABEL_TOKENS
    used = 0
    count = 0
    for word in pool:
        cost = len(pieces(f" {word}")) + label
        cost *= often if count < common else seldom
        # A common word stands in the answer too.
        cost += len(pieces(f" {word}")) + 4 if count < common else 0
        if used + cost > room:
            break
        used += cost
        count += 1
    words = pool[:count]
    entries = _mix(desk, words, min(common, count), often, seldom)
    row.add(_numbered(pieces, entries, "\n"), asking)
    wanted = set(words[:common])
    found = [word for word in dict.fromkeys(entries) if word in wanted]
    row.answer(_numbered_parts(pieces, found))
    row.end(pieces.eos)
    return row


def _mix(desk: Desk, words: list[str], common: int, often: int, seldom: int) -> list[str]:
    entries = words[:common] * often + words[common:] * seldom
    desk.rng.shuffle(entries)
    return entries


def _label(pieces: Pieces, number: int, front: str) -> Ids:
    return [*pieces(front), *number_ids(pieces, number)[1:], *pieces(".")]


def _numbered(pieces: Pieces, words: Iterable[str], front: str) -> Ids:
    ids: Ids = []
    for i, word in enumerate(words, start=1):
        ids += _label(pieces, i, front if i == 1 else " ")
        ids += pieces(f" {word}")
    return ids


def _numbered_parts(pieces: Pieces, words: Iterable[str]) -> list[tuple[Ids, int]]:
    parts: list[tuple[Ids, int]] = []
    for i, word in enumerate(words, start=1):
        parts += [(_label(pieces, i, " "), 0), (pieces(f" {word}"), WORD_LOOKUPS)]
    return parts


def frequent_words_row(desk: Desk, request: Request) -> Row:
    """A row of `fwe`: made-up words whose counts fall with the square of their rank."""
    pieces, rng = desk.pieces, desk.rng
    task = definitions()[request.task]
    head, tail = task.template.split(" {context}")
    opening = [pieces.bos, *pieces(head)]
    asking = [*pieces(tail), *pieces(task.answer_prefix)]
    room = request.length - len(opening) - len(asking) - 24
    size = max(room // TOKENS_PER_WORD, NUM_ANSWERS + 2)
    words = [
        pieces.fresh(" " + "".join(rng.choices(string.ascii_lowercase, k=6))) for _ in range(size)
    ]
    words[0] = pieces(f" {NOISE_WORD}")
    # Shares of a total that just fits, as the zeta distribution has them.
    tokens_each = sum(len(word) * rank**-2.0 for rank, word in enumerate(words, start=1))
    total = room / tokens_each
    entries: list[Ids] = []
    for rank, word in enumerate(words, start=1):
        entries += [word] * int(total * rank**-2.0)
    rng.shuffle(entries)
    row = Row(request.task)
    row.add(opening, *entries, asking)
    row.answer([(word, 2) for word in words[1 : 1 + NUM_ANSWERS]])
    row.end(pieces.eos)
    return row
