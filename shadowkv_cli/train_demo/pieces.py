"""Text as token pieces whose concatenation is what the tokenizer makes of the whole text.

The demo tokenizer never merges across the borders of its pre-tokens. A piece starts at such a
border: with a space before a word, with a newline before something that is no space, with a digit
or a hyphen. Encoding each piece once and joining ids is much faster than encoding whole prompts.
"""

from __future__ import annotations

import itertools
import random
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shadowkv_cli.catalogue.places import DEMO_TOKENIZER_DIR
from shadowkv_cli.tasks.ruler.synthetic_prose import prose_sentences
from shadowkv_cli.tasks.ruler.synthetic_qa import SyntheticQA
from shadowkv_cli.tasks.ruler.words import random_value

Ids = list[int]

HELD_OUT_SENTENCES = 20_000
"""The first sentences of the prose, which the tasks read, are not trained on."""
TRAINED_SENTENCES = 40_000
HELD_OUT_QUESTIONS = 1_000
"""Questions below this index are not trained on."""

_UUID_PIECES = re.compile(r"[a-f]+|\d|-")


class Pieces:
    """Encodes pieces, each once, and draws the random ones."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        backend: Any = Tokenizer.from_file(str(DEMO_TOKENIZER_DIR / "tokenizer.json"))
        self._backend = backend
        self._known: dict[str, Ids] = {}
        self._spaces: list[bool] = []
        self.bos: int = backend.token_to_id("<|bos|>")
        self.eos: int = backend.token_to_id("<|eos|>")
        self.pad: int = backend.token_to_id("<|pad|>")
        self.size: int = self._backend.get_vocab_size()
        self.questions = {
            "squad": SyntheticQA(bridging=False),
            "hotpotqa": SyntheticQA(bridging=True),
        }

    def __call__(self, text: str) -> Ids:
        """Ids of a piece that will be seen again."""
        ids = self._known.get(text)
        if ids is None:
            ids = self._known[text] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def fresh(self, text: str) -> Ids:
        """Ids of a piece that will hardly be seen again."""
        ids: Ids = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: list[str]) -> Iterator[Ids]:
        """Ids of many texts that need not be remembered."""
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            yield encoding.ids

    def starts_word(self, token: int) -> bool:
        """Whether a token begins with a space."""
        if not self._spaces:
            names = map(self._backend.id_to_token, range(self.size))
            self._spaces = [name.startswith("\u0120") for name in names]
        return self._spaces[token]

    def decode(self, ids: Ids) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def value(self, kind: str, rng: random.Random) -> tuple[str, Ids]:
        """A key or value as it stands after a space: its text and its ids, the space included."""
        text = random_value(kind, rng)
        return text, self.of_value(kind, text)

    def of_value(self, kind: str, text: str) -> Ids:
        if kind == "words":
            # The hyphens inside of words have pieces of their own too.
            first, *others = text.split("-")
            ids = list(self(f" {first}"))
            for word in others:
                ids += self("-")
                ids += self(word)
            return ids
        ids = []
        pieces = _UUID_PIECES.findall(text)
        if pieces[0].isdigit():
            ids += self(" ")
        else:
            pieces[0] = f" {pieces[0]}"
        for piece in pieces:
            ids += self(piece)
        return ids

    @cached_property
    def prose(self) -> Prose:
        return Prose(self)


@dataclass(frozen=True)
class Passage:
    """Consecutive prose.

    Attributes:
        ids: the text, with a space in front.
        ends: where in `ids` each sentence ends; the last one may be cut.
        opening: the same without the space in front.
    """

    ids: array[int]
    ends: list[int]
    opening: array[int]


class Prose:
    """Sentences of the project's prose behind those that the tasks read."""

    def __init__(self, pieces: Pieces) -> None:
        stop = HELD_OUT_SENTENCES + TRAINED_SENTENCES
        sentences = list(itertools.islice(prose_sentences(), HELD_OUT_SENTENCES, stop))
        self._pieces = pieces
        self._ids = array("H")
        self._ends = [0]
        for ids in pieces.encode_all([f" {text}" for text in sentences]):
            self._ids.extend(ids)
            self._ends.append(len(self._ids))
        self._first_words = [text.split(" ", 1)[0] for text in sentences]

    def draw(self, rng: random.Random, tokens: int) -> Passage:
        """Draw about `tokens` tokens, cut at a word."""
        first = rng.randrange(len(self._first_words) - TRAINED_SENTENCES // 4)
        begin = self._ends[first]
        end = begin + max(tokens, 0)
        while end > begin and not self._pieces.starts_word(self._ids[end]):
            end -= 1
        last = bisect_left(self._ends, end, lo=first)
        ends = [self._ends[j] - begin for j in range(first + 1, last)]
        ids = self._ids[begin:end]
        if not ids:
            return Passage(ids, [], ids)
        word = self._first_words[first]
        opening = array("H", self._pieces(word)) + ids[len(self._pieces(f" {word}")) :]
        return Passage(ids, [*ends, len(ids)], opening)
