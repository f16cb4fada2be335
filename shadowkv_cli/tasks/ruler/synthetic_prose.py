"""Prose that the project writes itself, for haystacks where no essays can be had.

A grammar of sentence patterns over the word lists, seeded by a constant: every machine gets the
same endless text, and no sentence occurs twice in it. It reads like prose to a tokenizer and to
attention; it has no plot, and scores on it compare with nothing published.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from shadowkv_cli.tasks.package_data import read_yaml
from shadowkv_cli.tasks.ruler.words import word_list

PROSE_VERSION = "shadowkv prose 1"

_SUBJECTS = (
    "the {a} {n}",
    "a {a} {n}",
    "every {n} in the {n}",
    "{name}",
    "the {n} beside the {n}",
    "{name} and the {n}",
    "the keeper of the {n}",
    "no {n} of that {a} kind",
    "most of the {n}",
    "whoever owned the {n}",
)
_ACTIONS = (
    "carried {o} to the {n}",
    "had little use for {o}",
    "left {o} near the {n}",
    "remembered {o} better than the {n}",
    "could not explain {o}",
    "traded {o} for a {a} {n}",
    "waited for {o} until evening",
    "described {o} in a letter",
    "built {o} out of an old {n}",
    "looked {a} next to {o}",
    "kept {o} away from the {n}",
    "seemed to need {o} more than the {n}",
    "asked the {n} about {o}",
    "found {o} under the {n}",
)
_OBJECTS = (
    "the {n}",
    "a {a} {n}",
    "another {n}",
    "the {a} {n} of {name}",
    "a {n} and a {n}",
    "that {n}",
    "some {a} thing called a {n}",
)
_FRAMES = (
    "{S} {V}.",
    "{S} {V}.",
    "{S} {V}, and {s} {V}.",
    "{S} {V}, but {s} {V}.",
    "When {s} {V}, {s} {V}.",
    "After the {a} {n}, {s} {V}.",
    "In the {n}, {s} {V}.",
    "Because {s} {V}, {s} {V}.",
    "It was said that {s} {V}.",
    "For a while {s} {V}; then {s} {V}.",
    "If {s} {V}, then {s} {V}.",
    "Nobody noticed how {s} {V}.",
    "{S} {V}, which made the {n} {a}.",
    "Long before that, {s} {V}.",
    '"{S} {V}," said {name}.',
)
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_SLOT = re.compile(r"\{(\w+)\}")


def synthetic_words(name: str) -> list[str]:
    """One list of synthetic.yaml."""
    text: str = read_yaml("ruler/synthetic.yaml")[name]
    return text.split()


@cache
def plain_words(name: str) -> tuple[str, ...]:
    """Words of one list that are plain lower-case letters and not profane."""
    profane = {word.lower() for word in word_list("profanitylist")} | set(
        synthetic_words("left_out")
    )
    words = {w for w in word_list(name) if re.fullmatch(r"[a-z]+", w) and w not in profane}
    return tuple(sorted(words))


def prose_sentences() -> Iterator[str]:
    """Yield sentences without end, each of them once."""
    rng = random.Random(PROSE_VERSION)
    slots = {
        "n": plain_words("nounlist"),
        "a": plain_words("adjectivelist"),
        "name": tuple(synthetic_words("prose_names")),
        "s": _SUBJECTS,
        "S": _SUBJECTS,
        "V": _ACTIONS,
        "o": _OBJECTS,
    }

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        options = slots[slot]
        text = options[int(rng.random() * len(options))]
        if "{" in text:
            text = _SLOT.sub(fill, text)
        return text[0].upper() + text[1:] if slot == "S" else text

    seen: set[str] = set()
    while True:
        sentence = with_articles(_SLOT.sub(fill, _FRAMES[int(rng.random() * len(_FRAMES))]))
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def with_articles(text: str) -> str:
    """Write `an` before a vowel."""
    return _ARTICLE.sub(r"\1n ", text)
