"""Muon for the matrices of the layers, AdamW for embeddings, head and norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz iteration of Jordan's Muon (2024): singular values go to about 1 in five steps."""
ITERATIONS = 5


def orthogonalized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest matrices with equal singular values of (n, a, b), a <= b."""
    a, b, c = COEFFICIENTS
    x = x.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "backward has not run"
    return parameter.grad


class Muon:
    """Momentum whose update is orthogonalized, all matrices of one shape at a time."""

    def __init__(self, parameters: list[nn.Parameter], *, momentum: float, decay: float) -> None:
        self.momentum = momentum
        self.decay = decay
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            key = tuple(sorted(parameter.shape))
            self._groups.setdefault(key, []).append(parameter)
        self._averages = {
            key: torch.zeros((len(group), *key), device=group[0].device)
            for key, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for key, group in self._groups.items():
            wide = [p.shape[0] <= p.shape[1] for p in group]
            gradients = torch.stack(
                [_gradient(p) if w else _gradient(p).mT for p, w in zip(group, wide, strict=True)]
            )
            average = self._averages[key]
            average.mul_(self.momentum).add_(gradients)
            dtype = torch.bfloat16 if average.is_cuda else torch.float32
            update = orthogonalized(gradients + self.momentum * average, dtype).float()
            parts = [u if w else u.mT for u, w in zip(update, wide, strict=True)]
            scales = [max(1.0, p.shape[0] / p.shape[1]) ** 0.5 for p in group]
            for parameter, part, scale in zip(group, parts, scales, strict=True):
                parameter.mul_(1 - rate * self.decay).add_(part, alpha=-rate * scale)

    def state_dict(self) -> dict[str, Any]:
        return {str(key): average for key, average in self._averages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, average in self._averages.items():
            average.copy_(state[str(key)])


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the layers, and all other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    return matrices, others
