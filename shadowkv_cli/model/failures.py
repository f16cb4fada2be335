"""Whose work it was when something fails."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from shadowkv_cli.config import MethodSpec, ShadowKVSpec
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.methods import Group
from shadowkv_cli.ops.packed import CannotPack


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


NO_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED")
"""What torch and the libraries under it say, if not by the type of an error."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room, on the device or on the host."""
    if isinstance(error, MethodFailure):
        return error.out_of_memory
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    )


def one_line(error: BaseException) -> str:
    """An error in one line, with its type if it is not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ShadowKVError) else f"{type(error).__name__}: {text}"


def who_packs(specs: Iterable[MethodSpec], part: str) -> list[MethodSpec]:
    """Of some methods those whose `values` or `landmarks` are packed."""
    return [s for s in specs if isinstance(s, ShadowKVSpec) and s.packs(part)]


@contextmanager
def blaming(suspects: Sequence[MethodSpec]) -> Iterator[None]:
    """Turn what fails in the work of some methods into their `MethodFailure`."""
    try:
        yield
    except CannotPack as error:
        raise MethodFailure(who_packs(suspects, error.part), one_line(error)) from error
    except (RuntimeError, ValueError) as error:
        raise MethodFailure(
            suspects, one_line(error), out_of_memory=is_out_of_memory(error)
        ) from error


def specs_of(group: Group, rows: Iterable[int]) -> list[MethodSpec]:
    """The specs of some rows of a group."""
    return [group.rows[row].spec for row in rows]
