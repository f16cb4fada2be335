"""Work beside the current CUDA stream, in a captured graph too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second stream that is forked from the current one and joined by its marks.

    What was allocated before the fork and is used beside must be kept until after the join.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Issue work that begins when all that was issued before is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """An event behind what was issued beside so far; waiting for it joins."""
        return self.stream.record_event()
