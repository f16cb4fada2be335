"""Rows of the published files as prompts with their references."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shadowkv_cli.errors import UsageError
from shadowkv_cli.tasks.longbench.definitions import LongBenchSet
from shadowkv_cli.tasks.longbench.matching import paragraph_number

BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))
LONGEST_BUCKET = "8k+"
CHOICES = "ABCD"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        number: of its row in the published file, from 0.
        text: the whole prompt, without chat template.
        tail_characters: characters behind the context.
        references: any of them is right.
        all_classes: labels of a classification.
        groups: what it is also averaged by.
        second_text: the prompt of a second call, with the mark for the first answer.
    """

    number: int
    text: str
    tail_characters: int
    references: list[str]
    all_classes: list[str] | None
    groups: list[str] | None
    second_text: str | None = None


def parse_rows(content: bytes, name: str) -> list[dict[str, Any]]:
    """Objects of a JSONL file, or of one JSON list. Raises UsageError naming the line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text.") from None
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except ValueError:
            raise UsageError(f"{name} is not valid JSON, or is cut off.") from None
        numbered = list(enumerate(rows, start=1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except ValueError:
                    raise UsageError(
                        f"{name} line {number} is not valid JSON, or is cut off."
                    ) from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UsageError(f"{name} row {number} is not an object.")
    if not numbered:
        raise UsageError(f"{name} holds no rows.")
    return [row for _, row in numbered]


def _field(row: Mapping[str, Any], field: str, check: Callable[[Any], bool], where: str) -> Any:
    if field not in row:
        raise UsageError(f"{where} has no column '{field}'.")
    if not check(row[field]):
        raise UsageError(f"{where}: '{field}' is not what LongBench has there.")
    return row[field]


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    return str(_field(row, field, lambda value: isinstance(value, str), where))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def v1_item(row: Mapping[str, Any], number: int, entry: LongBenchSet, name: str, e: bool) -> Item:
    """One row of LongBench. Raises UsageError for a missing column, or no answer."""
    where = f"{name} row {number + 1}"
    fields = {"context": _text(row, "context", where), "input": _text(row, "input", where)}
    answers: list[str] = _field(row, "answers", _texts, where)
    classes = None
    if entry.metric == "longbench_classification":
        classes = _field(row, "all_classes", _texts, where)
    word = {"longbench_retrieval": "Paragraph ", "longbench_retrieval_zh": "段落"}.get(entry.metric)
    if word and not all(paragraph_number(answer, word) for answer in answers):
        raise UsageError(f"{where}: 'answers' has no number behind '{word}'.")
    groups = None
    if e:
        words = _field(row, "length", lambda v: isinstance(v, int), where)
        groups = [next((label for limit, label in BUCKETS if words < limit), LONGEST_BUCKET)]
    tail = entry.prompt.partition("{context}")[2]
    return Item(
        number,
        entry.prompt.format(**fields),
        len(tail.format(**fields)),
        list(answers),
        classes,
        groups,
    )


def v2_item(
    row: Mapping[str, Any], number: int, prompt: str, name: str, second: str | None = None
) -> Item:
    """One row of LongBench v2, `second` the prompt of a second call.

    Raises UsageError for a missing column, or another answer.
    """
    where = f"{name} row {number + 1}"
    answer = _field(row, "answer", lambda v: isinstance(v, str) and v in tuple(CHOICES), where)
    difficulty = _field(row, "difficulty", lambda v: v in ("easy", "hard"), where)
    length = _field(row, "length", lambda v: v in ("short", "medium", "long"), where)
    fields = {"$DOC$": "context", "$Q$": "question"}
    fields |= {f"$C_{letter}$": f"choice_{letter}" for letter in CHOICES}
    text, tail = prompt, prompt.partition("$DOC$")[2] or prompt
    # One after the other, as officially: a document that spells a later mark is changed too.
    for mark, field in fields.items():
        value = _text(row, field, where).strip()
        text, tail = text.replace(mark, value), tail.replace(mark, value)
        second = second.replace(mark, value) if second else None
    return Item(number, text, len(tail), [answer], None, [difficulty, length], second)
