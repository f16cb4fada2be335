"""bfloat16 in some 13 bits an element, the same to the bit: how values and landmarks may be stored.

The upper byte of an element, its sign and all but the last bit of its exponent, holds little: most
elements of a row lie within 15 binary orders of its largest one. So a sign and three bits tell how
far the exponent is above a base of the row, and the few elements that lie below are listed. A row,
a token of a KV head or a landmark, becomes `packed_width` bytes:

    1           the base
    1           how many strays follow, at most MOST_STRAYS
    2 each      a stray's place among the D, and its upper byte; zeros where there is none
    D           the lower byte of each element: the last bit of its exponent, and its mantissa
    D / 2       a sign, and three bits that the base is added to; eight elements in four bytes, the
                first four in the lower halves of these, the others in the upper ones

Zeros stray, too, and beside an infinity or NaN all else does: a row with more than MOST_STRAYS is
refused. A row needs nothing but its own bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.config import PACKABLE, PACKED_HEADER_BYTES, packed_width
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.ops.library import check


class CannotPack(ShadowKVError):
    """A row's exponents differ so much that packing it would lose bits.

    Attributes:
        part: what the rows are, `values` or `landmarks`.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(
            f"{part} cannot be packed to the bit: {reason}: use {PACKABLE[part]}=model."
        )
        self.part = part


MOST_STRAYS = (PACKED_HEADER_BYTES - 2) // 2
HIGHEST_CODE = 7
NOT_FINITE = 127
"""The upper bits of the exponent of infinities and NaN."""
NAN_BYTE = 0xF8
"""A row of such bytes alone stands for NaN in the last four of every eight elements."""


def pack(rows: Tensor, part: str = "values") -> Tensor:
    """Pack rows to the bit.

    Args:
        rows: bfloat16 [..., D], D a multiple of 8.
        part: what they are, for the error: `values` or `landmarks`.

    Returns:
        uint8 [..., packed_width(D)].

    Raises:
        ValueError: no bfloat16, or no such D.
        CannotPack: a row has more strays than fit. To know it the host waits for a GPU.
    """
    packer = Packer()
    packed = packer.pack(rows, part)
    packer.check()
    return packed


class Packer:
    """Packs rows without waiting for a GPU; whether they could be packed is asked at the end."""

    def __init__(self) -> None:
        self._worst: dict[tuple[str, int], list[Tensor]] = {}
        """Of a part and D, what `_pack` says of each of its calls."""

    def pack(self, rows: Tensor, part: str) -> Tensor:
        """As the function `pack`, but what cannot be packed is anything, and `check` refuses it."""
        dim = rows.shape[-1]
        fits = dim % 8 == 0 and rows.dtype == torch.bfloat16
        check(fits, "pack", f"rows must be bfloat16 [..., 8 n], got {rows.dtype} [..., {dim}]")
        packed = rows.new_empty(*rows.shape[:-1], packed_width(dim), dtype=torch.uint8)
        if rows.numel():
            bits = rows.contiguous().view(torch.int16).flatten(0, -2)
            self._worst.setdefault((part, dim), []).append(_pack(bits, packed.flatten(0, -2)))
        return packed

    def check(self) -> None:
        """Raise CannotPack where a row of those packed so far cannot be, and forget them."""
        found, self._worst = self._worst, {}
        for (part, dim), worst in found.items():
            strays, highest = divmod(int(torch.stack(worst).max()), NOT_FINITE + 1)
            if strays > MOST_STRAYS:
                which = ", an infinity or NaN" if highest == NOT_FINITE else ""
                raise CannotPack(
                    part,
                    f"{strays} of {dim} elements that belong together are zero or some 15 binary "
                    f"orders below the largest{which}, and {MOST_STRAYS} fit",
                )

    def forget(self) -> None:
        """Nobody asks for what was packed so far."""
        self._worst.clear()


def _pack(bits: Tensor, out: Tensor) -> Tensor:
    """Pack int16 [T, D] into uint8 [T, W].

    Returns:
        Of the row with most strays their number times 128, and its highest exponent: int64 [].
    """
    dim = bits.shape[1]
    exponents = _exponents(bits)
    base = _base(exponents)
    near = exponents >= base
    out[:, :1] = base
    counts = (~near).sum(-1)
    out[:, 1:PACKED_HEADER_BYTES] = _listed(bits, near, counts)
    fields = out[:, PACKED_HEADER_BYTES:]
    fields[:, :dim] = (bits & 0xFF).to(torch.uint8)
    signs = (bits >> 12 & 0x8).to(torch.uint8)
    codes = (torch.where(near, exponents - base, 0) | signs).unflatten(-1, (-1, 2, 4))
    fields[:, dim:] = (codes[..., 0, :] | codes[..., 1, :] << 4).flatten(1)
    return (counts * (NOT_FINITE + 1) + base[:, 0] + HIGHEST_CODE).max()


def stray_counts(rows: Tensor) -> Tensor:
    """Elements of each row that no code tells: int64 [...] of bfloat16 [..., D].

    Rows of more than MOST_STRAYS cannot be packed.
    """
    exponents = _exponents(rows.view(torch.int16))
    return (exponents < _base(exponents)).sum(-1)


def _exponents(bits: Tensor) -> Tensor:
    """All but the last bit of the exponents, uint8."""
    return (bits >> 8 & 0x7F).to(torch.uint8)


def _base(exponents: Tensor) -> Tensor:
    """[..., 1]: elements from there on have codes."""
    return exponents.amax(-1, keepdim=True).clamp_min(HIGHEST_CODE) - HIGHEST_CODE


def _listed(bits: Tensor, near: Tensor, counts: Tensor) -> Tensor:
    """What follows the base of each row: the number of its strays, and these; uint8 [T, 15].

    Where those of one row do not fit, all may be anything.
    """
    rows = len(bits)
    out = bits.new_zeros(rows + 1, PACKED_HEADER_BYTES - 1, dtype=torch.uint8)
    out[:rows, 0] = counts.clamp_max(MOST_STRAYS)
    # Places in the order of rows; how many there are only the device knows.
    found = torch.nonzero_static(~near, size=rows * MOST_STRAYS, fill_value=-1)
    row, place = found.unbind(1)
    nth = torch.arange(len(found), device=bits.device) - (counts.cumsum(0) - counts)[row]
    is_listed = (row >= 0) & (nth < MOST_STRAYS)
    row, nth = torch.where(is_listed, row, rows), nth.clamp(0, max(MOST_STRAYS - 1, 0))
    out[row, 1 + 2 * nth] = place.to(torch.uint8)
    out[row, 2 + 2 * nth] = (bits[row.clamp_max(rows - 1), place] >> 8 & 0xFF).to(torch.uint8)
    return out[:rows]


def unpack(packed: Tensor) -> Tensor:
    """bfloat16 [..., D] of uint8 [..., packed_width(D)].

    Bytes that `pack` never gives are something, too: buffers hold some that no step attends.
    """
    dim = (packed.shape[-1] - PACKED_HEADER_BYTES) * 2 // 3
    flat = packed.flatten(0, -2)
    head, rest = flat[:, :PACKED_HEADER_BYTES], flat[:, PACKED_HEADER_BYTES:]
    pairs = rest[:, dim:].unflatten(-1, (-1, 1, 4))
    codes = torch.cat((pairs & 0xF, pairs >> 4), -2).flatten(1)  # [T, D]
    upper = (codes & 0x7) + head[:, :1] | (codes & 0x8) << 4
    listed = head[:, 2:].unflatten(-1, (MOST_STRAYS, 2))
    there = torch.arange(MOST_STRAYS, device=flat.device) < head[:, 1:2]
    places = listed[..., 0].long()
    row, nth = (there & (places < dim)).nonzero().unbind(1)
    upper[row, places[row, nth]] = listed[row, nth, 1]
    bits = upper.to(torch.int16) << 8 | rest[:, :dim]
    return bits.view(torch.bfloat16).view(*packed.shape[:-1], dim)
