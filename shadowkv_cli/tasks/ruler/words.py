"""The word lists behind RULER's keys and word pools: wonderwords, pinned, its version recorded."""

from __future__ import annotations

import random
import uuid
from functools import cache
from importlib.metadata import version
from importlib.resources import files


@cache
def word_list(name: str) -> tuple[str, ...]:
    """The lines of one list: `nounlist`, `adjectivelist`, `verblist` or `profanitylist`."""
    text = (files("wonderwords.assets") / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line.rstrip() for line in text.splitlines())


def wonderwords_version() -> str:
    """Version of the lists; keys differ between versions."""
    return version("wonderwords")


@cache
def _distinct(name: str) -> tuple[str, ...]:
    return tuple(sorted(set(word_list(name))))


def random_word_key(rng: random.Random) -> str:
    """Draw `adjective-noun`, as RULER's keys are.

    RULER draws from the sorted set of all such strings; drawing both parts gives the same set. The
    few strings that two pairs spell alike are twice as likely.
    """
    return f"{rng.choice(_distinct('adjectivelist'))}-{rng.choice(_distinct('nounlist'))}"


def random_value(kind: str, rng: random.Random) -> str:
    """Draw a key or value: 7 digits (`numbers`), `words` or a version 4 UUID (`uuids`)."""
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    assert kind == "words", f"unknown kind of value: {kind}"
    return random_word_key(rng)


@cache
def common_word_pool() -> tuple[str, ...]:
    """Distinct nouns, adjectives and verbs, sorted: what CWE draws from."""
    words = {*word_list("nounlist"), *word_list("adjectivelist"), *word_list("verblist")}
    return tuple(sorted(words))


class WordDraw:
    """An endless sequence of distinct words for CWE: the shuffled pool, then random compounds.

    RULER switches to a list of English words of 8.5 MB when a prompt needs more words than the pool
    has. That list cannot be shipped, so the draw goes on with `adjective-noun` compounds.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._words = list(common_word_pool())
        rng.shuffle(self._words)
        self._seen: set[str] | None = None

    def first(self, count: int) -> list[str]:
        """The first `count` words of this draw."""
        if len(self._words) < count and self._seen is None:
            self._seen = set(self._words)
        while len(self._words) < count:
            assert self._seen is not None
            word = random_word_key(self._rng)
            if word not in self._seen:
                self._seen.add(word)
                self._words.append(word)
        return self._words[:count]
