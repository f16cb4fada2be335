"""The torch library that the ops live in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shadowkv"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op: its reference serves every device until a compiled kernel takes one over."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def check(condition: bool, op: str, message: str) -> None:
    """Refuse a tensor that an op cannot take; the message names it and what was expected."""
    if not condition:
        raise ValueError(f"{op}: {message}")
