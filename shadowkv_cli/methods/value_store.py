"""The values of prompts, in every form that the chosen methods want them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shadowkv_cli.config import StoredDtype, ValueForm, packed_width
from shadowkv_cli.methods.pinned import HostMemory
from shadowkv_cli.ops.fp8 import FP8, quantise
from shadowkv_cli.ops.packed import Packer

EXACT = ValueForm("device")
"""As full attention reads them."""


def stored(kept_in: StoredDtype, dtype: torch.dtype, dim: int) -> tuple[torch.dtype, int]:
    """Dtype and width of rows as they are kept, which the model has as D elements of its dtype."""
    if kept_in == "packed":
        return torch.uint8, packed_width(dim)
    return FP8 if kept_in == "fp8" else dtype, dim


class ValueStore:
    """Values of P prompts of up to S tokens, in one form or several a layer.

    Attributes:
        held: [P, Hk, S, D] by form and layer; of the exact ones [P, Hk, S', D].
            Packed ones are uint8 [P, Hk, S, W], see `ops.packed`.
        scales: of those in fp8, float32 [P, Hk, C] by chunk size and layer, beside the model.
        packer: knows whether what was packed could be.
    """

    def __init__(
        self,
        forms: Sequence[Sequence[ValueForm]],
        size: tuple[int, int, int, int],
        exact_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make room.

        Args:
            forms: wanted of each layer.
            size: P, Hk, S and D.
            exact_tokens: S', with what full attention generates.
            dtype: the model's.
            device: where the model is.
        """
        prompts, heads, self.tokens, dim = size
        self.held: dict[ValueForm, dict[int, Tensor]] = {}
        self.scales: dict[int, dict[int, Tensor]] = {}
        self.packer = Packer()
        self._host = HostMemory(pinned=device.type == "cuda")

        def room(form: ValueForm) -> tuple[tuple[int, ...], torch.dtype]:
            kept_in, width = stored(form.dtype, dtype, dim)
            return (prompts, heads, exact_tokens if form == EXACT else self.tokens, width), kept_in

        places = [(layer, form) for layer, wanted in enumerate(forms) for form in wanted]
        on_host = [room(form) for _, form in places if form.placement == "host"]
        host_spaces = iter(self._host.take(*on_host))
        for layer, form in places:
            if form.placement == "host":
                space = next(host_spaces)
            else:
                own_size, kept_in = room(form)
                space = torch.empty(own_size, dtype=kept_in, device=device)
            self.held.setdefault(form, {})[layer] = space
            # Values of one chunk size have one set of scales, wherever they lie.
            chunk_size = form.chunk_size
            if chunk_size and layer not in self.scales.setdefault(chunk_size, {}):
                count = self.tokens // chunk_size
                self.scales[chunk_size][layer] = torch.empty(
                    prompts, heads, count, dtype=torch.float32, device=device
                )

    @property
    def exact(self) -> dict[int, Tensor]:
        """The exact values beside the model, by layer: empty where no method wants them."""
        return self.held.get(EXACT, {})

    def add_layer(self, layer: int, prompt_index: int, v: Tensor) -> None:
        """Take in a prompt's values of a layer, [Hk, S, D], in each form that is wanted there."""
        sources: dict[tuple[StoredDtype, int | None], Tensor] = {("model", None): v}
        for form, by_layer in self.held.items():
            if layer not in by_layer:
                continue
            kept_in = (form.dtype, form.chunk_size)
            if kept_in not in sources:
                sources[kept_in] = self._converted(layer, prompt_index, v, form)
            source = sources[kept_in]
            target = by_layer[layer][prompt_index, :, : source.shape[1]]
            if form.placement == "host":
                _copy_by_head(target, source)
            else:
                target.copy_(source)

    def _converted(self, layer: int, prompt_index: int, v: Tensor, form: ValueForm) -> Tensor:
        if form.chunk_size:
            scales = self.scales[form.chunk_size][layer][prompt_index]
            return _quantised(v, form.chunk_size, scales)
        out = v.new_empty(*v.shape[:2], packed_width(v.shape[2]), dtype=torch.uint8)
        # Head by head: what is in between is several times as large.
        for head, own in enumerate(v):
            out[head] = self.packer.pack(own, "values")
        return out

    def chunked(self, layer: int, chunk_size: int, form: ValueForm) -> tuple[Tensor, Tensor | None]:
        """The values as chunks [P, Hk, C, c, D], and of those in fp8 their scales [P, Hk, C].

        Of packed ones W bytes stand where D elements do.
        """
        chunks = self.held[form][layer][:, :, : self.tokens].unflatten(2, (-1, chunk_size))
        if not form.chunk_size:
            return chunks, None
        assert form.chunk_size == chunk_size, "scales of other chunks"
        return chunks, self.scales[chunk_size][layer]


def _copy_by_head(to: Tensor, values: Tensor) -> None:
    """Copy [Hk, S, D] into host memory without waiting: part of a row is contiguous by head only.

    Whatever is not contiguous there goes through ordinary memory, for which the host waits.
    """
    for host, device in zip(to, values, strict=True):
        host.copy_(device, non_blocking=True)


def _quantised(v: Tensor, chunk_size: int, scales: Tensor) -> Tensor:
    """The whole chunks of v [Hk, S, D] in fp8, their scales written to scales [Hk, C].

    A remainder that fills no chunk is left out: it is attended as it is.
    """
    count = v.shape[1] // chunk_size
    out = torch.empty(v.shape[0], count * chunk_size, v.shape[2], dtype=FP8, device=v.device)
    # Head by head: what is float32 in between would be the largest tensor of a prefill.
    for head, own in enumerate(v[:, : count * chunk_size]):
        rounded, scales[head, :count] = quantise(own.unflatten(0, (count, chunk_size)), 2)
        out[head] = rounded.flatten(0, 1)
    return out
