"""Prompt data that rows share: held once a prompt, whatever the number of methods and cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.config import (
    MethodSpec,
    ModelShape,
    ShadowKVSpec,
    StoredDtype,
    ValueForm,
)
from shadowkv_cli.methods.low_rank import (
    WIDEST_WHOLE,
    Method,
    factorise_parts,
    working_dtype,
)
from shadowkv_cli.methods.tiles import tiles
from shadowkv_cli.methods.value_store import EXACT, ValueStore, stored
from shadowkv_cli.ops.fp8 import quantise
from shadowkv_cli.ops.rotary import unrotate


@dataclass(frozen=True)
class Prompt:
    """A prompt in the store: its index, its length, and a name that seeds random draws."""

    index: int
    tokens: int
    key: str


@dataclass
class RotaryTables:
    """The tables that rotate queries and keys, one a distinct set of frequencies.

    Attributes:
        cos, sin: [T, S', D'] in the model's dtype, as the model's own module computes them.
        index: int32 [P], the table of each prompt.
        interleaved: the pairing, see `ops.rotary`.
    """

    cos: Tensor
    sin: Tensor
    index: Tensor
    interleaved: bool

    def halves(self) -> tuple[Tensor, Tensor]:
        """One entry a pair of dimensions: [T, S', D' / 2] each."""
        half = self.cos.shape[-1] // 2
        return self.cos[..., :half], self.sin[..., :half]


LandmarkForm = tuple[int, int, StoredDtype]
"""Chunk size, landmarks a chunk, and how they are kept."""


@dataclass(frozen=True)
class Needs:
    """What the chosen methods want kept of a prompt.

    Attributes:
        keys: whether exact keys are wanted.
        values: the forms of values, by layer.
        rank: the largest of low-rank keys; 0 for none.
        landmarks: their forms.
        alignment: the room for a prompt is a multiple of so many tokens.
    """

    keys: bool
    values: tuple[tuple[ValueForm, ...], ...]
    rank: int
    landmarks: tuple[LandmarkForm, ...]
    alignment: int

    @classmethod
    def of(cls, specs: Sequence[MethodSpec], num_layers: int) -> Needs:
        """Unite the needs of several methods."""
        shadow = [s for s in specs if isinstance(s, ShadowKVSpec)]
        exact = any(s.keeps_exact for s in specs)
        by_spec = [s.value_forms(num_layers) for s in shadow]
        by_spec += [[EXACT] * num_layers] if exact else []
        values = [dict.fromkeys(forms) for forms in zip(*by_spec, strict=True)]
        landmarks = {(s.chunk_size, s.landmarks_per_chunk, s.landmark_dtype) for s in shadow}
        return cls(
            keys=exact,
            values=tuple(map(tuple, values)),
            rank=max((s.rank for s in shadow), default=0),
            landmarks=tuple(sorted(landmarks)),
            alignment=math.lcm(*{getattr(s, "chunk_size", 1) for s in specs}),
        )


WORD_BYTES = 16
"""What a kernel reads at once where it can."""


def empty_in_words(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [A, B, C, …] of which every [C, …] begins at a whole word and is contiguous."""
    outer, chunks, inner = size[:2], size[2], size[3:]
    step = WORD_BYTES // dtype.itemsize
    held = math.ceil(chunks / step) * step
    return torch.empty(*outer, held, *inner, dtype=dtype, device=device)[:, :, :chunks]


class PromptStore:
    """Keys, values, low-rank keys and landmarks of P prompts, of up to S tokens, all layers.

    Attributes:
        keys: [P, Hk, S', D] a layer, with room for what full attention generates; or none.
        values: exact values beside the model, of the same shape, by layer; or none.
        value_store: values in every form that is wanted, those included.
        landmarks: [P, Hk, C, L, D] by form and layer, of packed ones [P, Hk, C, L, W].
        landmark_scales: of those in fp8, float32 [P, Hk, C, L].
        similarity: float32 [Hk, C] by chunk size, of the prompt and layer taken in last.
        packer: packs values and landmarks; whoever fills the store lets it check them at the end.
    """

    def __init__(
        self,
        shape: ModelShape,
        specs: Sequence[MethodSpec],
        *,
        num_prompts: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.needs = needs = Needs.of(specs, shape.num_layers)
        self.num_prompts = num_prompts
        self.prompt_tokens = math.ceil(prompt_tokens / needs.alignment) * needs.alignment
        layers, heads, dim = range(shape.num_layers), shape.num_kv_heads, shape.head_dim
        prompts, tokens = num_prompts, self.prompt_tokens

        def empty(*size: int, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [torch.empty(*size, dtype=dtype, device=device) for _ in layers]

        # The tokens that full attention generates follow the prompt.
        held = tokens + (new_tokens if any(spec.name == "full" for spec in specs) else 0)
        self.keys = empty(prompts, heads, held, dim) if needs.keys else []
        self.value_store = ValueStore(
            needs.values, (prompts, heads, tokens, dim), held, dtype, device
        )
        self.values = self.value_store.exact
        self.packer = self.value_store.packer
        rank = needs.rank
        self.coefficients = empty(prompts, tokens, rank) if rank else []
        self.basis = empty(prompts, heads, rank, dim) if rank else []
        self.landmarks: dict[LandmarkForm, list[Tensor]] = {}
        self.landmark_scales: dict[LandmarkForm, list[Tensor]] = {}
        for form in needs.landmarks:
            chunks = (prompts, heads, tokens // form[0], form[1])
            kept_in, width = stored(form[2], dtype, dim)
            self.landmarks[form] = empty(*chunks, width, dtype=kept_in)
            if form[2] == "fp8":
                self.landmark_scales[form] = [
                    empty_in_words(*chunks, dtype=torch.float32, device=device) for _ in layers
                ]
        self.similarity: dict[int, Tensor] = {}
        self.low_rank_method: Method | None = None
        """How low-rank keys are found; None: as their sizes ask for."""
        self.tables: RotaryTables | None = None
        """Set before the first prompt; a captured graph reads them where they are."""

    def chunked(self, tensor: Tensor, chunk_size: int) -> Tensor:
        """View the prompt part of keys or values as chunks: [P, Hk, C, c, D]."""
        return tensor[:, :, : self.prompt_tokens].unflatten(2, (-1, chunk_size))

    def add_layer(self, layer: int, prompt: Prompt, k: Tensor, v: Tensor) -> None:
        """Take in a prompt's layer: k and v [Hk, S, D], after RoPE."""
        p, tokens = prompt.index, prompt.tokens
        assert tokens <= self.prompt_tokens, f"a prompt of {tokens}, room for {self.prompt_tokens}"
        if self.keys:
            self.keys[layer][p, :, :tokens] = k
        self.value_store.add_layer(layer, p, v)
        for form in self.landmarks:
            self._add_landmarks(layer, prompt, k, form)
        if self.coefficients:
            self._add_low_rank(layer, prompt, k)

    def _add_landmarks(self, layer: int, prompt: Prompt, k: Tensor, form: LandmarkForm) -> None:
        size, count, kept_in = form
        here = (prompt.index, slice(None), slice(prompt.tokens // size))
        means, self.similarity[size] = ops.build_landmarks(k, size, count)
        if kept_in == "fp8":
            means, self.landmark_scales[form][layer][here] = quantise(means, 1)
        if kept_in == "packed":
            means = self.packer.pack(means, "landmarks")
        self.landmarks[form][layer][here] = means

    def _add_low_rank(self, layer: int, prompt: Prompt, k: Tensor) -> None:
        coefficients = self.coefficients[layer][prompt.index, : prompt.tokens]
        basis = factorise_parts(self._plain_keys(prompt, k), coefficients, self.low_rank_method)
        heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        self.basis[layer][prompt.index] = basis.view(-1, heads, dim).transpose(0, 1)

    def _plain_keys(self, prompt: Prompt, k: Tensor) -> Callable[[], Iterable[Tensor]]:
        """Gives the keys [Hk, S, D] without their rotation, all heads side by side.

        In tiles [T, Hk*D], each time anew, or as one tensor [S, Hk*D] where that is small beside
        what the model holds.
        """
        assert self.tables is not None, "rotary tables come before the first layer"
        interleaved = self.tables.interleaved
        table = self.tables.index[prompt.index : prompt.index + 1].long()
        cos, sin = (half[:, : prompt.tokens][table][0] for half in self.tables.halves())
        heads, tokens, dim = k.shape
        dtype = working_dtype(k.device, k.dtype)

        def unrotated(tile: slice) -> Tensor:  # in float32 and step by step: much for all tokens
            return unrotate(k[:, tile], cos[tile], sin[tile], interleaved)

        def in_tiles() -> Iterator[Tensor]:
            for tile in tiles(tokens, finer=2):
                yield unrotated(tile).to(dtype).transpose(0, 1).flatten(1)

        if heads * dim > WIDEST_WHOLE:
            return in_tiles
        whole = torch.empty(tokens, heads * dim, dtype=dtype, device=k.device)
        by_head = whole.view(tokens, heads, dim).transpose(0, 1)
        for tile in tiles(tokens):
            by_head[:, tile] = unrotated(tile)
        return lambda: [whole]
