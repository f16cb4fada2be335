"""Fit a draw to a context length: the most units whose prompt fits, so that one more does not.

Whole prompts are encoded two or three times a sample. The first size comes from estimates (token
counts of words, lines and documents, each counted once); the rest is checking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shadowkv_cli.tasks.ruler.draws import Draw, Rendered
from shadowkv_cli.tasks.tokenization import count_plain

MARGIN_CHARACTERS = 96
"""Text on both sides of a change within which its tokens can be shared with what is around it."""
SEAM_TOKENS = 2
"""By how much a unit more may make an encoding shorter."""
LOCAL_SHARE = 4
"""A change is local if it touches less than 1/4 of the prompt."""


class DoesNotFit(Exception):
    """The smallest size of a draw is too long."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"{tokens} tokens at least")
        self.tokens = tokens


@dataclass(frozen=True)
class Calibration:
    """How estimates of one task and length become tokens, measured on one draw.

    Attributes:
        units: the size that should just fit.
        offset: tokens of what does not grow, without the draw's `fixed_tokens`.
        scale: tokens per estimated token or other measure of size.
        smallest_tokens: tokens of the smallest size.
    """

    units: int
    offset: float
    scale: float
    smallest_tokens: int


@dataclass(frozen=True)
class Fitted:
    """The largest size that fits, with its prompt and tokens (without the answer's)."""

    units: int
    rendered: Rendered
    prompt_tokens: int


class _Sizes:
    """Encodes a draw at any size, each once; keeps only the renderings that can still be used."""

    def __init__(self, draw: Draw, limit: int) -> None:
        self.draw = draw
        self.limit = limit
        self.tokens: dict[int, int] = {}
        self.rendered: dict[int, Rendered] = {}

    def fits(self, units: int) -> bool:
        if units not in self.tokens:
            rendered = self.draw.render(units)
            self.rendered[units] = rendered
            self.tokens[units] = self.draw.bench.count(rendered.prompt + rendered.answer_prefix)
        return self.tokens[units] <= self.limit


def check_smallest(draw: Draw, limit: int) -> None:
    """Raise DoesNotFit if the smallest size of the draw is longer than `limit` tokens."""
    rendered = draw.render(draw.min_units)
    tokens = draw.bench.count(rendered.prompt + rendered.answer_prefix)
    if tokens > limit:
        raise DoesNotFit(tokens)


def calibrate(draw: Draw, limit: int) -> Calibration:
    """Measure a draw at three sizes. Raises DoesNotFit if its smallest is longer than `limit`."""
    sizes = _Sizes(draw, limit)
    smallest = draw.min_units
    if not sizes.fits(smallest):
        raise DoesNotFit(sizes.tokens[smallest])
    known = [smallest]
    units = 2 * smallest + 8
    for _ in range(2):
        sizes.fits(units)
        known.append(units)
        rise = sizes.tokens[units] - sizes.tokens[smallest]
        scale = rise / (draw.estimate(units) - draw.estimate(smallest))
        offset = sizes.tokens[units] - scale * draw.estimate(units)
        units = _largest(draw, units, _excess(draw, offset, scale, limit))
        if units in known:
            break
    return Calibration(units, offset - draw.fixed_tokens(), scale, sizes.tokens[smallest])


def fit(draw: Draw, limit: int, calibration: Calibration) -> Fitted:
    """Find the size n that fits `limit` tokens while n + 1 does not.

    The result depends on the draw, the limit and the calibration only. Raises DoesNotFit.
    """
    sizes = _Sizes(draw, limit)
    offset, scale = calibration.offset + draw.fixed_tokens(), calibration.scale

    low, high = draw.min_units - 1, None  # low fits (or is below the smallest), high does not
    units = _largest(draw, calibration.units, _excess(draw, offset, scale, limit))
    while True:
        if sizes.fits(units):
            low = max(low, units)
        else:
            high = units if high is None else min(high, units)
        if high == low + 1:
            if low < draw.min_units:
                raise DoesNotFit(sizes.tokens[high])
            beyond = _fits_beyond(sizes, high)
            if beyond is None:
                break
            low, high, units = beyond, None, beyond + 1
            continue
        units = _next_size(draw, sizes, units, scale)
        units = max(units, low + 1)
        if high is not None:
            units = min(units, high - 1)
    return Fitted(low, sizes.rendered[low], sizes.tokens[low])


def _excess(draw: Draw, offset: float, scale: float, limit: int) -> Callable[[int], float]:
    """Estimated tokens above the limit, by size."""
    return lambda units: round(offset + scale * draw.estimate(units)) - limit


def _next_size(draw: Draw, sizes: _Sizes, units: int, scale: float) -> int:
    """Where the limit should lie, as seen from a size whose tokens are known."""
    tokens = sizes.tokens[units]

    def excess(other: int) -> float:
        return tokens + round(draw.tokens_between(units, other, scale)) - sizes.limit

    target = _largest(draw, units, excess)
    # A size that fits and has no better one behind it: look at the one that should not fit.
    return units + 1 if target == units else target


def _largest(draw: Draw, start: int, excess: Callable[[int], float]) -> int:
    """The largest size whose excess is not above 0, searched from `start`; the smallest if none."""
    start = max(start, draw.min_units)
    step = 1
    if excess(start) <= 0:
        low, high = start, start + step
        while excess(high) <= 0:
            step *= 2
            low, high = high, high + step
    else:
        low, high = start - step, start
        while low > draw.min_units and excess(low) > 0:
            step *= 2
            low, high = low - step, low
        if low <= draw.min_units:
            low = draw.min_units
            if high <= low or excess(low) > 0:
                return low
    while high - low > 1:
        middle = (low + high) // 2
        if excess(middle) <= 0:
            low = middle
        else:
            high = middle
    return low


def _fits_beyond(sizes: _Sizes, high: int) -> int | None:
    """A size above `high` that fits although `high` does not: a unit can close a seam."""
    if sizes.tokens[high] - sizes.limit > SEAM_TOKENS:
        return None
    draw = sizes.draw
    here = sizes.rendered[high]
    there = draw.render(high + 1)
    difference = local_difference(
        draw, here.prompt + here.answer_prefix, there.prompt + there.answer_prefix
    )
    if difference is None or sizes.tokens[high] + difference > sizes.limit:
        return None
    return high + 1 if sizes.fits(high + 1) else None


def local_difference(draw: Draw, before: str, after: str) -> int | None:
    """Tokens that `after` has more than `before`, from the text around the change alone.

    None where the change is not local.
    """
    shorter = min(len(before), len(after))
    front = _agreeing(shorter, lambda n: before[:n] == after[:n])
    back = _agreeing(shorter - front, lambda n: n == 0 or before[-n:] == after[-n:])
    front = before.rfind(" ", 0, max(front - MARGIN_CHARACTERS, 0)) + 1
    back = max(back - MARGIN_CHARACTERS, 0)
    old = before[front : len(before) - back]
    new = after[front : len(after) - back]
    if max(len(old), len(new)) * LOCAL_SHARE > len(after):
        return None
    draw.bench.characters_encoded += len(old) + len(new)
    old_tokens, new_tokens = count_plain(draw.bench.tokenizer, [old, new])
    return new_tokens - old_tokens


def _agreeing(limit: int, agrees: Callable[[int], bool]) -> int:
    """The largest n up to `limit` for which `agrees` holds, given that it holds below it."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if agrees(middle):
            low = middle
        else:
            high = middle - 1
    return low
