"""Worker processes that end with the main one and leave Ctrl-C to it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, ParamSpec, TypeVar

from shadowkv_cli.errors import ShadowKVError

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def worker_pool(
    num_workers: int, start: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, each of which runs `start(*arguments)` first.

    Raises ShadowKVError where one of them dies.
    """
    pool = ProcessPoolExecutor(
        num_workers,
        # A fork would copy the threads of libraries in whatever state they are.
        mp_context=get_context("spawn"),
        initializer=_start,
        initargs=(start, arguments),
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ShadowKVError(
            "A worker process ended unexpectedly (out of memory?): run the same command again with "
            "a smaller --num-workers; what was written is kept."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start(*arguments)


def _end_with_parent() -> None:
    """End this worker when the main process was killed, which could not end it itself."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def submit(
    pool: ProcessPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Future[T]:
    """Give work to the pool, which may start a worker: one that never hears of Ctrl-C.

    That goes to the main process, which ends the workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, *args, **kwargs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
