"""The essay haystack: an endless text that is read by words and cut at sentences."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator

from shadowkv_cli.tasks.ruler.synthetic_prose import prose_sentences
from shadowkv_cli.tasks.tokenization import UnitCounter

_BLOCK = 4096
_HASHED_WORDS = 20_000


class Essay:
    """Sentences of a corpus, over and over, or of the endless synthetic prose.

    RULER splits the first n words of the text; here the text is split once and the sentence that
    the n-th word falls into is cut there, which differs only in the last, cut sentence.
    """

    def __init__(self, sentences: tuple[str, ...] | None) -> None:
        """With None, the project's own prose."""
        self._source: Iterator[str] = (
            prose_sentences() if sentences is None else itertools.cycle(sentences)
        )
        self._words: list[str] = []
        self._sentence_ends: list[int] = []  # words up to and with each sentence
        self._text = ""
        self._word_ends: list[int] = []  # characters of `_text` up to and with each word
        self._token_sums = [0]

    def _ensure(self, words: int) -> None:
        if len(self._words) >= words:
            return
        added: list[str] = []
        while len(self._words) + len(added) < words + _BLOCK:
            added += next(self._source).split(" ")
            self._sentence_ends.append(len(self._words) + len(added))
        position = len(self._text)
        for word in added:
            position += len(word) + (position > 0)
            self._word_ends.append(position)
        self._words += added
        self._text = " ".join([self._text, *added]) if self._text else " ".join(added)

    def words(self, count: int) -> list[str]:
        """The first `count` words."""
        self._ensure(count)
        return self._words[:count]

    def num_sentences(self, words: int) -> int:
        """Sentences of the first `words` words, a cut one at the end included."""
        self._ensure(words)
        whole = bisect_right(self._sentence_ends, words)
        return whole + (whole == 0 or self._sentence_ends[whole - 1] < words)

    def text(self, first: int, last: int, words: int) -> str:
        """Sentences `first` up to, without, `last` of the first `words` words."""
        self._ensure(words)
        start = self._sentence_ends[first - 1] if first else 0
        end = min(self._sentence_ends[last - 1], words) if last else 0
        if start >= end:
            return ""
        begin = self._word_ends[start - 1] + 1 if start else 0
        return self._text[begin : self._word_ends[end - 1]]

    def tokens(self, words: int, counter: UnitCounter) -> int:
        """Tokens of the first `words` words, each counted by itself."""
        self._ensure(words)
        sums = self._token_sums
        if len(sums) <= words:
            new = self._words[len(sums) - 1 :]
            for count in counter.counts(f" {word}" for word in new):
                sums.append(sums[-1] + count)
        return sums[words]

    def digest(self) -> str:
        """Hash of the first words, for text that has no end."""
        self._ensure(_HASHED_WORDS)
        return hashlib.sha256(" ".join(self._words[:_HASHED_WORDS]).encode()).hexdigest()
