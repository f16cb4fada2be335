"""Errors that end a command with one clear line and a documented exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_INTERRUPTED = 130


class ShadowKVError(Exception):
    """What was asked for correctly failed; the message names it and the way out."""

    exit_code = EXIT_FAILED


class UsageError(ShadowKVError, ValueError):
    """The user's input is wrong; the message names the value and what would be right."""

    exit_code = EXIT_USAGE


class OutOfHostMemory(ShadowKVError, MemoryError):
    """The host has no room for what a run holds there."""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UsageError:
    """Build the error for a name not in a registry: what was likely meant, then all that exist.

    `where` follows the name, like `in datasets/demo`.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f" Did you mean '{close[0]}'?" if close else ""
    place = f" {where}" if where else ""
    return UsageError(f"Unknown {kind} '{name}'{place}.{meant} Known: {', '.join(names)}.")
