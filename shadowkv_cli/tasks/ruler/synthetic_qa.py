"""Questions with documents that the project writes itself, in place of SQuAD and HotpotQA.

A made-up country: towns, and people who were born in them. A question of the first kind is
answered by the document of one town; one of the second kind needs a person's document to learn the
birthplace, and the birthplace's document for the answer. Every name is unique, so the answer can be
found in the documents and nowhere else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from shadowkv_cli.tasks.ruler.qa_corpus import QAItem
from shadowkv_cli.tasks.ruler.synthetic_prose import plain_words, synthetic_words, with_articles

QA_VERSION = "shadowkv qa 1"
NUM_TOWNS = 12_000
NUM_PEOPLE = 12_000
TOWNS_PER_PROVINCE = 5
HOP_PARAGRAPHS = 10

_FIRST = synthetic_words("name_starts")
_MIDDLE = synthetic_words("name_middles")
_TOWN_END = synthetic_words("town_ends")
_PERSON_END = synthetic_words("family_ends")
_GIVEN = synthetic_words("given_names")
_JOBS = synthetic_words("jobs")
_REGIONS = synthetic_words("regions")


def _spread(index: int, size: int) -> int:
    """A fixed permutation of range(size), so that neighbours do not get neighbouring names."""
    return (index * 7_919 + 4_001) % size


def _name(index: int, size: int, ends: list[str]) -> str:
    number = _spread(index, size)
    number, first = divmod(number, len(_FIRST))
    end, middle = divmod(number, len(_MIDDLE))
    return _FIRST[first] + _MIDDLE[middle] + ends[end]


@dataclass(frozen=True)
class Town:
    """One town with the facts that questions ask for."""

    name: str
    founded: int
    founder: str
    trade: str
    landmark: str
    text: str


@dataclass(frozen=True)
class Person:
    """One person, whose birthplace is a town."""

    name: str
    birthplace: int
    text: str


def person_name(index: int) -> str:
    """A given name and a family name that no other person has."""
    family = _name(index, NUM_PEOPLE, _PERSON_END)
    return f"{_GIVEN[_spread(index, NUM_PEOPLE) % len(_GIVEN)]} {family}"


@lru_cache(maxsize=NUM_TOWNS)
def town(index: int) -> Town:
    """The town of that number, in [0, NUM_TOWNS)."""
    rng = random.Random(f"{QA_VERSION} town {index}")
    nouns, adjectives = plain_words("nounlist"), plain_words("adjectivelist")
    name = _name(index, NUM_TOWNS, _TOWN_END)
    founded = rng.randint(1103, 1897)
    founder = person_name(rng.randrange(NUM_PEOPLE))
    trade = f"{rng.choice(adjectives)} {rng.choice(nouns)}"
    landmark = f"the {rng.choice(adjectives).capitalize()} {rng.choice(nouns).capitalize()}"
    river = _name(rng.randrange(NUM_TOWNS), NUM_TOWNS, _PERSON_END)
    facts = [
        f"The town was founded in {founded} by {founder}, who had come with a few families.",
        f"Its main trade is the {trade}, which is sold as far as the coast.",
        f"Visitors come to {name} for {landmark}, a building on the market square.",
        f"The river {river} runs past the old {rng.choice(nouns)} works and the mill.",
        f"About {rng.randint(3, 480) * 100} people live there, and the {rng.choice(nouns)} is on "
        "its coat of arms.",
        f"A school for {rng.choice(nouns)} making was opened there in {rng.randint(1898, 1987)}.",
    ]
    rng.shuffle(facts)
    opening = f"{name} is a {rng.choice(adjectives)} town in the {rng.choice(_REGIONS)} lands."
    text = with_articles(" ".join([opening, *facts]))
    return Town(name, founded, founder, trade, landmark, text)


@lru_cache(maxsize=NUM_PEOPLE)
def person(index: int) -> Person:
    """The person of that number, in [0, NUM_PEOPLE)."""
    rng = random.Random(f"{QA_VERSION} person {index}")
    nouns, adjectives = plain_words("nounlist"), plain_words("adjectivelist")
    name = person_name(index)
    birthplace = rng.randrange(NUM_TOWNS)
    facts = [
        f"{name} was born in {town(birthplace).name} as the child of a {rng.choice(_JOBS)}.",
        f"A treatise on the {rng.choice(adjectives)} {rng.choice(nouns)} made the name known.",
        f"The later years were spent collecting every {rng.choice(nouns)} that could be found.",
        f"Letters to a friend describe a {rng.choice(adjectives)} {rng.choice(nouns)} and a "
        f"{rng.choice(nouns)}.",
        f"An award for work on the {rng.choice(nouns)} followed after {rng.randint(2, 29)} years.",
    ]
    rng.shuffle(facts)
    opening = f"{name} was a {rng.choice(adjectives)} {rng.choice(_JOBS)}."
    return Person(name, birthplace, with_articles(" ".join([opening, *facts])))


def _ask(place: Town, name: str, choice: int) -> tuple[str, str]:
    """Question and answer about a town that the question calls `name`."""
    return (
        (f"In which year was {name} founded?", str(place.founded)),
        (f"Who founded {name}?", place.founder),
        (f"What is the main trade of {name}?", place.trade),
        (f"Which building do visitors come to see in {name}?", place.landmark),
    )[choice]


class SyntheticQA:
    """The made-up country as a corpus; documents are numbered towns first, then people."""

    def __init__(self, bridging: bool) -> None:
        """With `bridging`, questions need two documents (HotpotQA), otherwise one (SQuAD)."""
        self.bridging = bridging
        self.name = f"{QA_VERSION} ({'two documents' if bridging else 'one document'})"
        self.num_documents = NUM_TOWNS + NUM_PEOPLE
        self.num_questions = NUM_PEOPLE if bridging else NUM_TOWNS

    def document(self, index: int) -> str:
        if index < NUM_TOWNS:
            place = town(index)
            return f"{place.name}\n{place.text}" if self.bridging else place.text
        someone = person(index - NUM_TOWNS)
        return f"{someone.name}\n{someone.text}" if self.bridging else someone.text

    def item(self, index: int) -> QAItem:
        rng = random.Random(f"{QA_VERSION} question {self.bridging} {index}")
        choice = rng.randrange(4)
        if not self.bridging:
            asked = _spread(index, NUM_TOWNS)
            question, answer = _ask(town(asked), town(asked).name, choice)
            start = asked - asked % TOWNS_PER_PROVINCE
            province = range(start, start + TOWNS_PER_PROVINCE)
            return QAItem(question, (answer,), (asked,), tuple(d for d in province if d != asked))
        asked = _spread(index, NUM_PEOPLE)
        someone = person(asked)
        question, answer = _ask(
            town(someone.birthplace), f"the town where {someone.name} was born", choice
        )
        own = {someone.birthplace: None, NUM_TOWNS + asked: None}
        while len(own) < HOP_PARAGRAPHS:
            own[rng.randrange(self.num_documents)] = None
        return QAItem(question, (answer,), tuple(own), (), tuple(own)[:2])
