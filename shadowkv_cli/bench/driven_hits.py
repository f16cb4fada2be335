"""Drive a cell to a hit rate: tune how fast its selecting queries drift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shadowkv_cli.console import notice
from shadowkv_cli.methods.drift import Drift
from shadowkv_cli.methods.sparse import SparseGroup
from shadowkv_cli.model.session import Session

CLOSE = 0.004
"""A hit rate this near to the wanted one is taken."""

ROUNDS = 12
SEED = 42
SLOWEST, FASTEST = 1e-5, 1.0
"""Range of one minus the correlation of neighbouring steps."""


def measured_hits(session: Session, first: Tensor, warmup: int, steps: int) -> float | None:
    """Hit rate of `steps` steps after `warmup` ones, from the end of the prefill."""
    session.reset()
    tokens = first
    with session.attached():
        for _ in range(warmup + steps):
            tokens = session.next_tokens(tokens).tokens
    return session.hit_rate(warmup + 1, warmup + steps)


def drive(
    session: Session,
    first: Tensor,
    wanted: float,
    warmup: int,
    steps: int,
    known: float | None = None,
) -> float:
    """Give the one cell that a session decodes queries that reach a hit rate.

    By halving the range of the logarithm of the drift; says so where it is not reached.

    Args:
        session: set to decode one cell, of which no graph is captured yet.
        first: int64 [R], the tokens to begin with.
        wanted: hit rate.
        warmup, steps: the hit rate is that of `steps` steps after `warmup` ones.
        known: what an earlier call for the same cell and rate returned: it is taken as it is.

    Returns:
        One minus the correlation of neighbouring steps' queries.
    """
    (_, group), *_ = session.batch.parts
    assert isinstance(group, SparseGroup), "only chunks that are fetched can be at hand"
    shape = group.shape
    drift = Drift(
        shape.num_layers,
        len(session.batch),
        shape.num_q_heads,
        shape.head_dim,
        like=group.keys[0],
        seed=SEED,
    )
    session.steer(drift)
    if known is not None:
        _set(drift, known)
        return known
    low, high = math.log(SLOWEST), math.log(FASTEST)
    hits: float | None = None
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        _set(drift, math.exp(middle))
        hits = measured_hits(session, first, warmup, steps)
        if hits is None or abs(hits - wanted) < CLOSE:
            break
        low, high = (low, middle) if hits < wanted else (middle, high)
    if hits is None or abs(hits - wanted) >= CLOSE:
        notice(f"A hit rate of {wanted:.0%} was not reached; it is {hits or 0:.1%}.")
    return math.exp(middle)


@torch.inference_mode()
def _set(drift: Drift, change: float) -> None:
    drift.keep.fill_(1 - change)
