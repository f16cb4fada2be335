"""Work beside the current stream: what a failure leaves behind is waited for."""

from __future__ import annotations

import pytest
import torch

from shadowkv_cli.methods import side_stream
from shadowkv_cli.methods.side_stream import Join, SideStream, after_failure, wait_for


class Event:
    """Counts who waits."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1


class Stream:
    """Of the class that torch has, without a GPU."""

    device = "cuda"

    def __init__(self, *_: object, **__: object) -> None:
        self.events: list[Event] = []

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def wait_stream(self, _: object) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_stream.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(side_stream.torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(side_stream.torch.cuda, "stream", lambda stream: stream)


def test_what_was_issued_before_a_failure_can_be_waited_for(no_gpu: None) -> None:
    stream = SideStream(torch.device("cpu"))
    with pytest.raises(MemoryError, match="no room"), stream.forked() as join:
        raise MemoryError("no room")
    assert join.event is stream.stream.events[0]


def test_all_join_where_one_fails(no_gpu: None) -> None:
    """The one that failed, those before it, and none that never began."""
    stream, begun = SideStream(torch.device("cpu")), [Join()]

    def work() -> None:
        with after_failure(lambda: wait_for(begun)):
            for fails in (False, True):
                with stream.forked() as join:
                    begun.append(join)
                    if fails:
                        raise MemoryError

    with pytest.raises(MemoryError):
        work()
    assert [event.waits for event in stream.stream.events] == [1, 1]


def test_without_a_failure_nobody_waits(no_gpu: None) -> None:
    stream, begun = SideStream(torch.device("cpu")), []
    with after_failure(lambda: wait_for(begun)), stream.forked() as join:
        begun.append(join)
    assert [event.waits for event in stream.stream.events] == [0]
