"""Low-rank form of the pre-RoPE keys of a layer, all KV heads side by side (paper, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def factorise(keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find A [S, r] and B [r, W] whose product is the best rank-r approximation of keys [S, W].

    By the eigenvectors of the Gram matrix in float32: they are nested, so a smaller rank is the
    first columns of A and rows of B, and one factorisation serves every rank of a sweep.
    """
    keys = keys.float()
    _, vectors = torch.linalg.eigh(keys.T @ keys)  # ascending eigenvalues
    basis = vectors[:, -rank:].flip(-1)  # [W, r]
    return keys @ basis, basis.T.contiguous()
