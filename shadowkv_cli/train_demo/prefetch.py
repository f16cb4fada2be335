"""Batches made ahead of their use, in this process or in several, always in the jobs' order."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from shadowkv_cli.train_demo.batches import Batch, Job, make_batch
from shadowkv_cli.train_demo.pieces import Pieces

AHEAD_PER_WORKER = 2

_pieces: Pieces | None = None


def _start() -> None:
    global _pieces
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _pieces = Pieces()
    _ = _pieces.prose


def _run(job: Job) -> Batch:
    assert _pieces is not None, "the worker was not started"
    return make_batch(_pieces, job)


class Prefetch:
    """Asks for jobs a fixed number of steps ahead, so that what a step trains on does not depend
    on how fast batches are made.

    Jobs that wait when a training pauses are drawn again on resuming, with the scores of then;
    without workers nothing waits, and a resumed training equals one that was not paused.
    """

    def __init__(self, job_for: Callable[[int], Job], first_step: int, workers: int) -> None:
        self._job_for = job_for
        self._next = first_step
        self._pool = None
        if workers:
            self._pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_start
            )
        self._pieces = None if workers else Pieces()
        self._waiting: deque[tuple[Job, Future[Batch]]] = deque()
        self._ahead = AHEAD_PER_WORKER * workers
        if self._pool:
            self._fill(self._pool)  # so that the workers start now

    def _fill(self, pool: ProcessPoolExecutor) -> None:
        while len(self._waiting) < self._ahead:
            job = self._job_for(self._next)
            self._waiting.append((job, pool.submit(_run, job)))
            self._next += 1

    def next(self) -> tuple[Job, Batch]:
        """The next step's job and batch."""
        if self._pool is None:
            assert self._pieces is not None
            job = self._job_for(self._next)
            self._next += 1
            return job, make_batch(self._pieces, job)
        self._fill(self._pool)
        job, future = self._waiting.popleft()
        return job, future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
