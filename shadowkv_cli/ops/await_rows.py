"""Going on with some rows of a selection while others are still under way."""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.ops.library import check, define

SELECT_PARTS = 8
"""What `select_chunks` adds to a row's count for each KV head whose ids are written."""


def _reference(done: Tensor, parts: int) -> None:
    check(done.dim() == 1, "await_rows", f"done must be [R], got {list(done.shape)}")
    # On a GPU what counts was issued before, and looking would wait for it.
    finished = done.is_cuda or bool((done >= parts).all())
    check(finished, "await_rows", f"done must be {parts} at least: nothing is under way")
    done.zero_()


def _fake(done: Tensor, parts: int) -> None:
    return None


define("await_rows(Tensor(a!) done, int parts) -> ()", _reference, _fake)


def await_rows(done: Tensor, parts: int) -> None:
    """Let the current stream wait until the count of every row is there, and set it to 0.

    On a GPU a kernel of one warp waits. What counts must have begun before, see `Progress.begun`:
    else this could keep it from beginning. It gives up after a minute, as a kernel that failed.

    Args:
        done: int32 [R], counted up by what is waited for.
        parts: the count of a row that is done.

    Raises:
        ValueError: on a CPU, where nothing is under way, a count that is too low.
    """
    torch.ops.shadowkv.await_rows(done, parts)


class Progress:
    """Which rows of a selection are done, so that work beside it begins with those.

    Attributes:
        done: int32 [R], counts of what is written of each row's ids.
        begun: on a GPU, happens when the selection runs, or later; None on a CPU.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.done = torch.zeros(rows, dtype=torch.int32, device=device)
        self.begun: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.begun = torch.cuda.Event()
            self.begun.record(torch.cuda.current_stream(device))  # so that it exists

    def wait(self, rows: slice, num_kv_heads: int) -> None:
        """Let the current stream, which has waited for `begun`, wait for the ids of some rows."""
        await_rows(self.done[rows], SELECT_PARTS * num_kv_heads)
