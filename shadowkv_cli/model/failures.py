"""Whose work it was when something fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from shadowkv_cli.config import MethodSpec
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.methods import Group


class MethodFailure(ShadowKVError):
    """Something failed in the rows of some methods; one of the `suspects` did it.

    Attributes:
        out_of_memory: there was no room on the device, so that fewer methods may succeed.
    """

    def __init__(
        self, suspects: Sequence[MethodSpec], reason: str, *, out_of_memory: bool = False
    ) -> None:
        super().__init__(reason)
        self.suspects = list(dict.fromkeys(suspects))
        self.out_of_memory = out_of_memory


def reason_of(error: BaseException) -> str:
    """An error in one line, its type first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def blaming(suspects: Sequence[MethodSpec]) -> Iterator[None]:
    """Turn what fails in the work of some methods into their `MethodFailure`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        raise MethodFailure(suspects, reason_of(error), out_of_memory=full) from error


def specs_of(group: Group, rows: Iterable[int]) -> list[MethodSpec]:
    """The specs of some rows of a group."""
    return [group.rows[row].spec for row in rows]
