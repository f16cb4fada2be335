"""Question sets with their documents: the form that the QA tasks read, and the official files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shadowkv_cli.errors import UsageError


@dataclass(frozen=True)
class QAItem:
    """One question.

    Attributes:
        question: as asked.
        answers: any of them is right.
        own: numbers of the documents that belong to the question, the gold ones among them.
        more: numbers of documents of the same article, taken before random ones.
        gold: numbers of those of `own` that hold the answer; all of them where none is named.
    """

    question: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    more: tuple[int, ...]
    gold: tuple[int, ...] = ()

    @property
    def gold_or_own(self) -> tuple[int, ...]:
        return self.gold or self.own


class QACorpus(Protocol):
    """Documents and questions by number."""

    @property
    def name(self) -> str: ...

    @property
    def num_documents(self) -> int: ...

    @property
    def num_questions(self) -> int: ...

    def document(self, index: int) -> str: ...

    def item(self, index: int) -> QAItem: ...


@dataclass(frozen=True)
class LoadedQA:
    """A corpus that was read from a file or the hub."""

    name: str
    documents: tuple[str, ...]
    items: tuple[QAItem, ...]

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def num_questions(self) -> int:
        return len(self.items)

    def document(self, index: int) -> str:
        return self.documents[index]

    def item(self, index: int) -> QAItem:
        return self.items[index]


def squad_corpus(name: str, rows: Iterable[Mapping[str, Any]]) -> LoadedQA:
    """Build a corpus from rows with `title, context, question, answers` (answers: texts).

    Documents are the distinct paragraphs, sorted; questions without an answer are left out.
    """
    rows = list(rows)
    documents = sorted({row["context"] for row in rows})
    number = {text: i for i, text in enumerate(documents)}
    articles: dict[str, dict[int, None]] = {}
    for row in rows:
        articles.setdefault(row["title"], {})[number[row["context"]]] = None
    items = []
    for row in rows:
        if row["answers"]:
            own = number[row["context"]]
            more = tuple(d for d in articles[row["title"]] if d != own)
            items.append(QAItem(row["question"], tuple(row["answers"]), (own,), more))
    return LoadedQA(name, tuple(documents), tuple(items))


def hotpotqa_corpus(name: str, rows: Iterable[Mapping[str, Any]]) -> LoadedQA:
    """Build a corpus from rows with `question, answer, context` (context: title, sentences).

    `supporting_facts` (title, sentence), where a row has them, name the gold documents.
    """
    questions = []
    for row in rows:
        own = {f"{t}\n{''.join(s)}": t for t, s in row["context"]}
        titles = {title for title, _ in row.get("supporting_facts", ())}
        gold = [text for text, title in own.items() if title in titles]
        questions.append((row["question"], row["answer"], list(own), gold))
    documents = sorted({text for _, _, own, _ in questions for text in own})
    number = {text: i for i, text in enumerate(documents)}

    def numbers(texts: list[str]) -> tuple[int, ...]:
        return tuple(number[text] for text in texts)

    items = [
        QAItem(question, (answer,), numbers(own), (), numbers(gold))
        for question, answer, own, gold in questions
    ]
    return LoadedQA(name, tuple(documents), tuple(items))


def read_squad_file(path: Path) -> LoadedQA:
    """Read the official SQuAD 2.0 JSON (dev-v2.0.json). Raises UsageError if it is none."""
    rows = []
    try:
        for number, article in enumerate(_read_json(path)["data"]):
            for paragraph in article["paragraphs"]:
                # A paragraph without questions is a document all the same.
                rows.append(_squad_row(number, paragraph["context"], "", []))
                for qa in paragraph["qas"]:
                    texts = [] if qa.get("is_impossible") else [a["text"] for a in qa["answers"]]
                    rows.append(_squad_row(number, paragraph["context"], qa["question"], texts))
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is not SQuAD's official JSON (dev-v2.0.json).") from None
    return _with_questions(squad_corpus(path.name, rows), path)


def _squad_row(article: int, context: str, question: str, answers: list[str]) -> dict[str, Any]:
    return {"title": str(article), "context": context, "question": question, "answers": answers}


def read_hotpotqa_file(path: Path) -> LoadedQA:
    """Read HotpotQA's official JSON. Raises UsageError if it is none."""
    try:
        corpus = hotpotqa_corpus(path.name, _read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path} is not HotpotQA's official JSON (hotpot_dev_distractor_v1.json)."
        ) from None
    return _with_questions(corpus, path)


def _with_questions(corpus: LoadedQA, path: Path) -> LoadedQA:
    if not corpus.items:
        raise UsageError(f"{path} holds no question with an answer.")
    return corpus


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise UsageError(f"{path} is not valid JSON.") from None
