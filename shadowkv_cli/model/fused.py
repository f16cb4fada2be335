"""Fused ops in place of a model's small kernels: norms, gates, rotations and joint projections.

Norms and MLPs are tried against what they replace, on random numbers, before they are used: a
family that does things in another way keeps its own. How it pairs rotated dimensions was found by
trying, too (`rotary.is_interleaved`); a joint product is the same rows of the same weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowkv_cli import ops
from shadowkv_cli.methods.tiles import is_long
from shadowkv_cli.model.replacing import Forward, replaced
from shadowkv_cli.model.residual import plain_layers
from shadowkv_cli.model.rotary import attention_modules

JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_projections(model: nn.Module) -> None:
    """Lay the weights of projections of one input side by side; the numbers stay the same.

    For good: the modules then hold views of one matrix, so that one product can serve all.
    """
    for module in model.modules():
        for names in JOINT:
            parts = [getattr(module, name, None) for name in names]
            if all(type(part) is nn.Linear for part in parts):
                _join([part for part in parts if part is not None])


def _join(parts: list[nn.Linear]) -> None:
    sizes = [part.out_features for part in parts]
    tensors = ["weight"] + (["bias"] if all(part.bias is not None for part in parts) else [])
    if any(part.bias is not None for part in parts) and "bias" not in tensors:
        return
    for name in tensors:
        whole = torch.cat([getattr(part, name).data for part in parts])
        for part, view in zip(parts, whole.split(sizes), strict=True):
            getattr(part, name).data = view


def _joint(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which these are the rows, one after the other; None if they are not."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        neighbours = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (neighbours and tensor.storage_offset() == end and tensor.is_contiguous()):
            return None
        end += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class _JointProduct:
    """One matrix product for several projections that are called with the same input.

    Queries, keys and values of a long prompt are apart: each has memory of its own then, which goes
    as soon as it is done with.
    """

    def __init__(self, parts: list[nn.Linear], weight: Tensor, *, of_attention: bool) -> None:
        self.parts, self.of_attention = parts, of_attention
        biases = [part.bias for part in parts if part.bias is not None]
        self.weight, self.bias = weight, _joint(biases) if biases else None
        self.sizes = [part.out_features for part in parts]
        self.input: Tensor | None = None
        self.outputs: list[Tensor | None] = []

    def forward_of(self, place: int) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if self.of_attention and is_long(x.shape[-2]):
                part = self.parts[place]
                return nn.functional.linear(x, part.weight, part.bias)
            if self.input is not x or self.outputs[place] is None:
                out = nn.functional.linear(x, self.weight, self.bias)
                self.input, self.outputs = x, [*out.split(self.sizes, -1)]
            taken, self.outputs[place] = self.outputs[place], None
            assert taken is not None
            if not any(part is not None for part in self.outputs):
                self.input = None  # nothing is kept for longer than it is wanted
            return taken

        return forward


def _norm(module: nn.Module, dtype: torch.dtype) -> Forward | None:
    """A root-mean-square norm as one op; its weight must have the model's dtype."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float)):
        return None
    if weight.dtype != dtype:
        return None
    return lambda x: ops.rms_norm(x, weight, eps)


def _gated(module: Any) -> Forward | None:
    """A gated MLP whose gate and product are one op."""
    if not isinstance(getattr(module, "down_proj", None), nn.Module):
        return None
    if hasattr(module, "gate_up_proj"):
        return lambda x: module.down_proj(ops.gated_silu(*module.gate_up_proj(x).chunk(2, -1)))
    if hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
        return lambda x: module.down_proj(ops.gated_silu(module.gate_proj(x), module.up_proj(x)))
    return None


@torch.no_grad()
def _does_the_same(module: Any, width: int, ours: Forward) -> bool:
    """Try a replacement on a few random tokens."""
    weight = next(module.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)
    size = (1, 3, width)
    x = torch.randn(size, generator=generator, device=weight.device).to(weight.dtype)
    theirs = module(x)
    if not isinstance(theirs, Tensor):
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps * float(theirs.abs().max())
    return torch.allclose(ours(x).float(), theirs.float(), rtol=0, atol=tolerance)


class Fused:
    """What of a model can be replaced, found once."""

    def __init__(self, model: PreTrainedModel, interleaved: bool) -> None:
        self.forwards: list[tuple[nn.Module, Forward]] = []
        self.plain_layers = plain_layers(model)
        self.interleaved = interleaved
        self.family: Any = importlib.import_module(type(attention_modules(model)[0]).__module__)
        hidden = model.config.get_text_config().hidden_size
        good: dict[type, bool] = {}
        for name, module in model.named_modules():
            kind = type(module)
            ours, width = None, hidden
            if kind.__name__.endswith("RMSNorm"):
                ours = _norm(module, model.dtype)
                width = module.weight.shape[-1] if ours else hidden
            elif name.split(".")[-1] == "mlp":
                ours = _gated(module)
            if ours is None:
                continue
            if kind not in good:
                good[kind] = _does_the_same(module, width, ours)
            if good[kind]:
                self.forwards.append((module, ours))
        for module in model.modules():
            for names in JOINT:
                parts: list[Any] = [getattr(module, part, None) for part in names]
                if all(type(part) is nn.Linear for part in parts):
                    self._add_joint(parts, of_attention="q_proj" in names)

    def _add_joint(self, parts: list[nn.Linear], *, of_attention: bool) -> None:
        weight = _joint([part.weight for part in parts])
        if weight is None:
            return
        product = _JointProduct(parts, weight, of_attention=of_attention)
        self.forwards += [(part, product.forward_of(i)) for i, part in enumerate(parts)]

    @property
    def modules(self) -> frozenset[nn.Module]:
        """Those that have another forward while it is applied."""
        return frozenset(module for module, _ in self.forwards)

    def rotate_in_place(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Queries and keys of a long prompt."""
        ops.rotate_heads_(q, k, cos, sin, self.interleaved)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace, and put back on the way out."""
        theirs = self.family.apply_rotary_pos_emb

        def rotate(
            q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if args or kwargs:  # another layout than [R, H, T, D]
                return theirs(q, k, cos, sin, *args, **kwargs)
            return ops.rotate_heads(q, k, cos, sin, self.interleaved)

        with ExitStack() as stack:
            for module, forward in self.forwards:
                stack.enter_context(replaced(module, forward))
            self.family.apply_rotary_pos_emb = rotate
            stack.callback(setattr, self.family, "apply_rotary_pos_emb", theirs)
            yield
