"""Samples answered in batches by several processes, this one among them; GPUs are shared out."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, groupby, pairwise, zip_longest
from multiprocessing import get_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from shadowkv_cli.answering import Question
from shadowkv_cli.environment import usable_cores
from shadowkv_cli.processes import submit, worker_pool
from shadowkv_cli.rowlog import Row
from shadowkv_cli.run_config import ModelChoice

if TYPE_CHECKING:
    from shadowkv_cli.answering import Answerer


@dataclasses.dataclass(frozen=True)
class Answered:
    """What came of a question.

    Attributes:
        backends: exact attention that this worker has used so far, and the TFLOP/s of its trial.
    """

    question: Question
    rows: list[Row]
    generated_tokens: int
    backends: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a worker needs to answer as this process does."""

    choice: ModelChoice
    reader: ModelChoice
    room: int
    tokenizer_mismatch: bool
    reuse_prefix: bool
    threads: int
    devices: int


Batch = Sequence[Question]
"""Questions that one batch answers."""

_answerer: Answerer | None = None


def in_batches(questions: Sequence[Question], most: int, workers: int) -> list[list[Question]]:
    """Neighbours of one layout, at most so many at a time, the larger batches first.

    As many batches for one worker as for another, where there are enough questions.
    """
    batches: list[list[Question]] = []
    for _, members in groupby(questions, lambda question: question.layout):
        alike = list(members)
        count = math.ceil(len(alike) / most)
        count = min(math.ceil(count / workers) * workers, len(alike))
        small, larger = divmod(len(alike), count)
        sizes = [small + (place < larger) for place in range(count)]
        ends = accumulate(sizes, initial=0)
        batches += [alike[first:end] for first, end in pairwise(ends)]
    return batches


def _start_worker(start: _Start, numbers: Any) -> None:
    global _answerer
    import torch

    from shadowkv_cli.answering import Answerer, tokenizer_of
    from shadowkv_cli.model.loading import load_model

    torch.set_num_threads(start.threads)
    choice = start.choice
    if start.devices:
        choice = dataclasses.replace(choice, device=f"cuda:{numbers.get() % start.devices}")
    _answerer = Answerer(
        load_model(choice),
        tokenizer_of(start.reader),
        backend=choice.backend,
        room=start.room,
        tokenizer_mismatch=start.tokenizer_mismatch,
        reuse_prefix=start.reuse_prefix,
    )


def _answer(batch: Batch) -> list[Answered]:
    assert _answerer is not None, "the worker was not started"
    return ask(_answerer, batch)


def ask(answerer: Answerer, batch: Batch) -> list[Answered]:
    """Answer in this process."""
    found = answerer.answer_together(batch)
    backends = dict(answerer.backends_used)
    return [
        Answered(question, rows, sum(row["generated_tokens"] or 0 for row in rows), backends)
        for question, rows in zip(batch, found, strict=True)
    ]


def answer_all(
    answerer: Answerer,
    batches: Sequence[Batch],
    choice: ModelChoice,
    reader: ModelChoice,
    num_workers: int,
) -> Generator[list[Answered], None, None]:
    """Yield each batch's answers as they are there; with one worker in the order of the batches.

    Args:
        answerer: of this process, which is one of the workers.
        batches: see `in_batches`.
        choice: the model that the others load. `cuda` and `auto` share out all GPUs; `cuda:N`
            keeps everyone on that one.
        reader: whose tokenizer they use.
        num_workers: processes, this one included.

    Raises:
        ShadowKVError: full attention failed, or a worker died.
    """
    others = min(num_workers, len(batches)) - 1
    if others < 1:
        for batch, following in zip_longest(batches, batches[1:], fillvalue=()):
            for question in (*batch[1:], *following[:1]):
                answerer.encoder.begin(question.sample.text)
            yield ask(answerer, batch)
        return
    import torch

    on_gpu = answerer.loaded.device.type == "cuda"
    spread = on_gpu and choice.device in ("auto", "cuda")
    start = _Start(
        choice=choice,
        reader=reader,
        room=answerer.room,
        tokenizer_mismatch=answerer.tokenizer_mismatch,
        reuse_prefix=answerer.reuse_prefix,
        threads=max(1, usable_cores() // num_workers),
        devices=torch.cuda.device_count() if spread else 0,
    )
    numbers = get_context("spawn").Queue()
    for number in range(others):
        numbers.put(number + 1)  # this process has the first GPU
    with worker_pool(others, _start_worker, (start, numbers)) as pool, _threads(start.threads):
        yield from _share(answerer, batches, pool, others)


@contextmanager
def _threads(count: int) -> Generator[None, None, None]:
    """Use fewer threads in this process for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _share(
    answerer: Answerer, batches: Sequence[Batch], pool: ProcessPoolExecutor, others: int
) -> Generator[list[Answered], None, None]:
    """Whoever is free takes a batch, this process from the front and others from the back.

    None is kept for anyone, and of two processes each has neighbours one after the other, whose
    prompts begin most alike where they were sorted.
    """
    waiting, done = deque(batches), SimpleQueue[Future[list[Answered]]]()

    def take(one: Callable[[], Batch]) -> Batch | None:
        try:
            return one()
        except IndexError:  # a thread beside this one took the last
            return None

    def give() -> None:
        if batch := take(waiting.pop):
            try:
                future = submit(pool, _answer, batch)
            except RuntimeError as error:  # a worker died in between: heard where answers are
                future = Future()
                future.set_exception(error)
            future.add_done_callback(collect)

    def collect(future: Future[list[Answered]]) -> None:
        """Runs beside this process' own work; after a failure nothing is started any more."""
        done.put(future)
        if not future.cancelled() and future.exception() is None:
            give()

    for _ in range(others):
        give()
    left = len(batches)
    try:
        while left:
            if own := take(waiting.popleft):
                yield ask(answerer, own)
                left -= 1
            while left and not (waiting and done.empty()):
                yield done.get().result()
                left -= 1
    finally:
        waiting.clear()
