"""Work beside the current CUDA stream, in a captured graph too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

FIRST, SECOND = -3, -2
"""Priorities of what goes before all else, the lowest number that torch tells apart, and next."""


@dataclass
class Join:
    """Where work that was issued beside is waited for; nothing to wait for without an event."""

    event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Let what has been issued on the current stream be what is waited for."""
        self.event = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        """Let the current stream go on when that work is done."""
        if self.event is not None:
            self.event.wait()


class SideStream:
    """Another stream, forked from the current one and joined by waiting for what it issued.

    What was allocated before the fork and is used beside must be kept until after the join; what
    is allocated beside, too.
    """

    def __init__(self, device: torch.device, priority: int = -1) -> None:
        """Of two streams that have work, the one with the lower priority number goes first."""
        self.stream = torch.cuda.Stream(device, priority=priority)

    @contextmanager
    def forked(self, ready: torch.cuda.Event | None = None) -> Iterator[Join]:
        """Issue work that begins when all that was issued before is done, or before an event.

        What was issued before a failure can be waited for, too.
        """
        if ready is None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        else:
            self.stream.wait_event(ready)
        join = Join()
        with torch.cuda.stream(self.stream):
            try:
                yield join
            finally:
                join.event = self.stream.record_event()


def beside(
    stream: SideStream | None, ready: torch.cuda.Event | None = None
) -> AbstractContextManager[Join]:
    """Issue work on a side stream (`forked`), or where there is none on the current one."""
    return nullcontext(Join()) if stream is None else stream.forked(ready)


@contextmanager
def after_failure(join: Callable[[], None]) -> Iterator[None]:
    """Join where something fails within: a capture cannot end while a stream has not.

    Without a failure whoever issued the work waits.
    """
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if not succeeded:
            join()


def wait_for(joins: Iterable[Join]) -> None:
    """Let the current stream wait for all of these."""
    for join in joins:
        join.wait()
