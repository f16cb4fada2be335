"""Whether methods can serve a model, found out by running it, not by a list of families."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowkv_cli.errors import UsageError
from shadowkv_cli.model.forward import last_logits
from shadowkv_cli.model.fused import Fused
from shadowkv_cli.model.rotary import compute_table, rotary_module
from shadowkv_cli.ops.rotary import unrotate

PROBE_TOKENS = 6
FARTHEST = 4096
"""Positions are spread up to here, so that slowly turning dimensions turn visibly too."""

TOLERANCE = {torch.float32: 1e-2}
HALF_TOLERANCE = 0.25
"""Relative change of a key over positions that is rounding; without a rotation it is about 1."""


class _Recorder:
    """Serves a model's attention exactly and keeps the keys of every layer."""

    context_tokens = PROBE_TOKENS
    fused: Fused | None = None
    micro_batches = None
    is_decoding = False
    wants_last_token = False

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin  # [PROBE_TOKENS, D']
        self.keys: dict[int, Tensor] = {}
        self.twice: set[int] = set()

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[None], self.sin[None]

    def end_layer(self) -> None:
        """Nothing is left to do."""

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in self.keys:
            self.twice.add(layer)
        self.keys[layer] = k[0]
        group = q.shape[1] // k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            is_causal=True,
            scale=scale,
        )


@torch.no_grad()
def probe_keys(model: PreTrainedModel, interleaved: bool) -> tuple[int, ...]:
    """Run one token, repeated at far positions, and compare the keys that reach the methods.

    All positions see the same values, so their keys differ by the rotation alone, in every layer.

    Returns:
        The layers where undoing the rotation does not give the same key everywhere: layers without
        rotation, or with a norm behind it. Exact methods can serve them, a low-rank form of the
        pre-RoPE keys can not.

    Raises:
        UsageError: the model does not run this way, or attends without asking us.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    weight = next(model.parameters())
    farthest = min(FARTHEST, config.max_position_embeddings)
    spread = torch.linspace(0, farthest - 1, PROBE_TOKENS, dtype=torch.float64)
    positions = spread.long().to(weight.device)
    table = compute_table(rotary_module(model), PROBE_TOKENS, farthest, weight.dtype, weight.device)
    recorder = _Recorder(*(part[positions] for part in table))
    ids = torch.full((1, PROBE_TOKENS), config.vocab_size // 2, device=weight.device)
    try:
        last_logits(model, recorder, ids, positions[None], 0)
    except UsageError:
        raise
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} cannot run with methods attached: {reason}") from error
    if recorder.twice:
        raise UsageError(f"{name} attends more than once a layer, which no method supports.")
    unserved = config.num_hidden_layers - len(recorder.keys)
    if unserved:
        raise UsageError(
            f"{unserved} of {config.num_hidden_layers} layers of {name} do not attend through "
            "transformers' attention interface, so no method can serve them."
        )
    half = recorder.cos.shape[-1] // 2
    tolerance = TOLERANCE.get(weight.dtype, HALF_TOLERANCE)
    odd = []
    for layer, keys in recorder.keys.items():
        plain = unrotate(keys, recorder.cos[:, :half], recorder.sin[:, :half], interleaved)
        change = (plain - plain[:, :1]).norm() / plain.norm().clamp_min(1e-20)
        if change > tolerance:
            odd.append(layer)
    return tuple(sorted(odd))
