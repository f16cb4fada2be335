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
    dim = rows.shape[-1]
    fits = dim % 8 == 0 and rows.dtype == torch.bfloat16
    check(fits, "pack", f"rows must be bfloat16 [..., 8 n], got {rows.dtype} [..., {dim}]")
    bits = rows.contiguous().view(torch.int16).flatten(0, -2)  # [T, D]
    exponents = _exponents(bits)
    base = _base(exponents)
    near = exponents >= base
    strays = (~near).nonzero()  # [M, 2]: in the order of rows, then of places
    out = bits.new_zeros(len(bits), packed_width(dim), dtype=torch.uint8)
    out[:, :1] = base
    if len(strays):
        _list_strays(out, strays, bits, part)
    fields = out[:, PACKED_HEADER_BYTES:]
    fields[:, :dim] = (bits & 0xFF).to(torch.uint8)
    signs = (bits >> 12 & 0x8).to(torch.uint8)
    codes = (torch.where(near, exponents - base, 0) | signs).unflatten(-1, (-1, 2, 4))
    fields[:, dim:] = (codes[..., 0, :] | codes[..., 1, :] << 4).flatten(1)
    return out.view(*rows.shape[:-1], packed_width(dim))


def stray_counts(rows: Tensor) -> Tensor:
    """Elements of each row that no code tells: int64 [...] of bfloat16 [..., D].

    `pack` refuses rows of more than MOST_STRAYS.
    """
    exponents = _exponents(rows.view(torch.int16))
    return (exponents < _base(exponents)).sum(-1)


def _exponents(bits: Tensor) -> Tensor:
    """All but the last bit of the exponents, uint8."""
    return (bits >> 8 & 0x7F).to(torch.uint8)


def _base(exponents: Tensor) -> Tensor:
    """[..., 1]: elements from there on have codes."""
    return exponents.amax(-1, keepdim=True).clamp_min(HIGHEST_CODE) - HIGHEST_CODE


def _list_strays(out: Tensor, strays: Tensor, bits: Tensor, part: str) -> None:
    """Write the strays [M, 2] of rows and places into the heads of what is packed."""
    row, place = strays.unbind(1)
    counts = torch.bincount(row, minlength=len(out))
    most = int(counts.max())
    if most > MOST_STRAYS:
        worst = _exponents(bits[counts.argmax()])
        which = ", an infinity or NaN" if int(worst.max()) == NOT_FINITE else ""
        raise CannotPack(
            part,
            f"{most} of {bits.shape[1]} elements that belong together are zero or some 15 binary "
            f"orders below the largest{which}, and {MOST_STRAYS} fit",
        )
    out[:, 1] = counts.to(torch.uint8)
    before = torch.cumsum(counts, 0) - counts
    at = 2 + 2 * (torch.arange(len(row), device=out.device) - before[row])
    out[row, at] = place.to(torch.uint8)
    out[row, at + 1] = (bits[row, place] >> 8 & 0xFF).to(torch.uint8)


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
