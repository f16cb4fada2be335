"""bfloat16 in some 13 bits an element, the same to the bit: how values may be stored.

The 8 bits of an exponent hold little: most elements of a token's value lie within 15 binary orders
of its largest one. So 4 bits tell how far an exponent is above a base of the token, and the few
that lie below are listed. A token of a KV head becomes `packed_width` bytes:

    1           the base: an element of code c > 0 has the exponent base + c
    1           how many strays follow, at most MOST_STRAYS
    2 each      a stray's place among the D, and its exponent; zeros where there is none
    D           sign and mantissa of each element
    D / 2       codes, eight elements in four bytes: 0 and 2, 4 and 6, 1 and 3, 5 and 7, the first
                in the lower half of its byte

Code 0 is the exponent 0, of zeros and subnormal numbers, or a stray's. Beside an infinity or NaN
all else strays, so a token that holds one is refused. A token needs nothing but its own bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowkv_cli.config import PACKED_HEADER_BYTES, packed_width
from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.ops.library import check


class CannotPack(ShadowKVError):
    """A token's exponents differ so much that packing it would lose bits."""


MOST_STRAYS = (PACKED_HEADER_BYTES - 2) // 2
HIGHEST_CODE = 15
NOT_FINITE = 255
"""The exponent of infinities and NaN."""
NAN_BYTE = 0xF0
"""A token of such bytes alone stands for NaN in every second pair."""
_LOWER, _UPPER = (0, 4, 1, 5), (2, 6, 3, 7)
"""Of eight elements, whose codes lie in the halves of the four bytes."""


def pack(values: Tensor) -> Tensor:
    """Pack values to the bit.

    Args:
        values: bfloat16 [..., D], D a multiple of 8.

    Returns:
        uint8 [..., packed_width(D)].

    Raises:
        ValueError: no bfloat16, or no such D.
        CannotPack: a token has more strays than fit. To know it the host waits for a GPU.
    """
    dim = values.shape[-1]
    fits = dim % 8 == 0 and values.dtype == torch.bfloat16
    check(fits, "pack", f"values must be bfloat16 [..., 8 n], got {values.dtype} [..., {dim}]")
    bits = values.contiguous().view(torch.int16).flatten(0, -2)  # [T, D]
    exponents = (bits >> 7 & 0xFF).to(torch.uint8)
    base = _base(exponents)
    near = exponents > base
    strays = (~near & (exponents != 0)).nonzero()  # [M, 2]: in the order of tokens, then of places
    out = bits.new_zeros(len(bits), packed_width(dim), dtype=torch.uint8)
    out[:, :1] = base
    if len(strays):
        _list_strays(out, strays, exponents)
    fields = out[:, PACKED_HEADER_BYTES:]
    fields[:, :dim] = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    codes = torch.where(near, exponents - base, 0).unflatten(-1, (-1, 8))
    fields[:, dim:] = (codes[..., _LOWER] | codes[..., _UPPER] << 4).flatten(1)
    return out.view(*values.shape[:-1], packed_width(dim))


def stray_counts(values: Tensor) -> Tensor:
    """Elements of each token that no code tells: int64 [...] of bfloat16 [..., D].

    `pack` refuses tokens of more than MOST_STRAYS.
    """
    exponents = (values.view(torch.int16) >> 7 & 0xFF).to(torch.uint8)
    return ((exponents != 0) & (exponents <= _base(exponents))).sum(-1)


def _base(exponents: Tensor) -> Tensor:
    """[..., 1]: elements with exponents above it have codes."""
    return exponents.amax(-1, keepdim=True).clamp_min(HIGHEST_CODE) - HIGHEST_CODE


def _list_strays(out: Tensor, strays: Tensor, exponents: Tensor) -> None:
    """Write the strays [M, 2] of tokens and places into the heads of what is packed."""
    token, place = strays.unbind(1)
    counts = torch.bincount(token, minlength=len(out))
    most = int(counts.max())
    if most > MOST_STRAYS:
        worst = exponents[counts.argmax()]
        which = ", an infinity or NaN" if int(worst.max()) == NOT_FINITE else ""
        raise CannotPack(
            f"values cannot be packed to the bit: a token has {most} elements more than "
            f"{HIGHEST_CODE - 1} binary orders below its largest{which}, and {MOST_STRAYS} fit: "
            "use value_dtype=model."
        )
    out[:, 1] = counts.to(torch.uint8)
    before = torch.cumsum(counts, 0) - counts
    at = 2 + 2 * (torch.arange(len(token), device=out.device) - before[token])
    out[token, at] = place.to(torch.uint8)
    out[token, at + 1] = exponents[token, place]


def unpack(packed: Tensor) -> Tensor:
    """bfloat16 [..., D] of uint8 [..., packed_width(D)].

    Bytes that `pack` never gives are something, too: buffers hold some that no step attends.
    """
    dim = (packed.shape[-1] - PACKED_HEADER_BYTES) * 2 // 3
    flat = packed.flatten(0, -2)
    head, rest = flat[:, :PACKED_HEADER_BYTES], flat[:, PACKED_HEADER_BYTES:].to(torch.int16)
    pairs = rest[:, dim:].unflatten(-1, (-1, 4))
    codes = rest.new_empty(len(flat), dim // 8, 8)
    codes[..., _LOWER], codes[..., _UPPER] = pairs & 0xF, pairs >> 4
    codes = codes.flatten(1)
    exponents = torch.where(codes > 0, codes + head[:, :1] & 0xFF, 0)
    listed = head[:, 2:].unflatten(-1, (MOST_STRAYS, 2)).long()
    there = torch.arange(MOST_STRAYS, device=flat.device) < head[:, 1:2]
    token, nth = (there & (listed[..., 0] < dim)).nonzero().unbind(1)
    exponents[token, listed[token, nth, 0]] = listed[token, nth, 1].to(torch.int16)
    signs = rest[:, :dim]
    bits = (signs & 0x7F) | exponents << 7 | (signs & 0x80) << 8
    return bits.view(torch.bfloat16).view(*packed.shape[:-1], dim)
