"""Rows of questions about documents."""

from __future__ import annotations

from shadowkv_cli.tasks.ruler.definitions import constants, definitions
from shadowkv_cli.train_demo.drawing import LOOKUPS, Desk, Request, Row
from shadowkv_cli.train_demo.pieces import HELD_OUT_QUESTIONS, Ids

MAX_QUESTIONS = 6
TOKENS_PER_QUESTION = 640
"""A row has no more questions than one in so many ids: each brings two documents."""
NEIGHBOUR_LENGTH = 2048
"""From this length on a question's own distractors are among the documents."""


def question_row(desk: Desk, request: Request) -> Row:
    """A row of `qa_1` or `qa_2`; one that is not exact asks about several documents."""
    pieces, rng = desk.pieces, desk.rng
    task = definitions()[request.task]
    corpus = pieces.questions[task.settings["dataset"]]
    head, tail = task.template.split("{context}")
    opening = [pieces.bos, *pieces(head.removesuffix("\n\n"))]
    tail = tail.removesuffix(" {query}")
    most = max(min(request.length // TOKENS_PER_QUESTION, MAX_QUESTIONS), 1)
    count = 1 if request.exact else rng.randint(1, most)

    def document(number: int, place: int) -> Ids:
        title = constants()["document"].split("\n")[0].format(i=place)
        return [*pieces(f"\n\n{title}"), *pieces("\n"), *pieces(corpus.document(number))]

    closing = Row(request.task)
    chosen: dict[int, None] = {}
    for _ in range(count):
        item = corpus.item(rng.randrange(HELD_OUT_QUESTIONS, corpus.num_questions))
        # The first two hold the answer.
        chosen.update(dict.fromkeys(item.own if request.exact else item.own[:2]))
        if request.exact and request.length >= NEIGHBOUR_LENGTH:
            chosen.update(dict.fromkeys(item.more))
        closing.add(pieces(tail), pieces(f" {item.question}"), pieces(task.answer_prefix))
        closing.answer([(pieces(f" {item.answers[0]}"), LOOKUPS)])
    closing.end(pieces.eos)
    room = request.length - len(opening) - len(closing.ids)
    documents = list(chosen)
    room -= sum(len(document(number, 1000)) for number in documents)
    while True:
        number = rng.randrange(corpus.num_documents)
        if number in chosen:
            continue
        room -= len(document(number, 1000))
        if room < 0:
            break
        chosen[number] = None
        documents.append(number)
    rng.shuffle(documents)
    row = Row(request.task)
    row.add(opening)
    for place, number in enumerate(documents, start=1):
        row.add(document(number, place))
    row.join(closing)
    return row
