"""Every setting of every method, checked when it is made; free of torch, for all to import."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from shadowkv_cli.errors import UsageError

OUTLIER_TOKENS_PER_BUDGET = Fraction(192, 1024)
"""Outlier tokens per token of sparse budget under `auto`: 48 chunks of 8 at 2,048 (paper, 5.1)."""

MAX_BUFFER = 1_000_000
"""Multiples of the selected chunks: far more than any prompt has."""

LEAST_SHARED_TOKENS = 64
"""Of the beginning that two prompts share: taking over less is not worth its copies."""

SCALE_BYTES = 4
"""Of the float32 that scales a chunk of values, or a landmark, in fp8."""
INDEX_BYTES = 4
"""Of the int32 that says where a chunk lies."""
PACKED_HEADER_BYTES = 16
"""Of a packed row, a token of a KV head or a landmark: see `ops.packed`."""
PACKABLE = {"values": "value_dtype", "landmarks": "landmark_dtype"}
"""What may be packed, and the setting that says so."""
LARGEST_PACKED_DIM = 256
"""A byte tells a place in a head."""

Placement = Literal["device", "host"]
StoredDtype = Literal["model", "packed", "fp8"]
"""How a tensor is kept: in the dtype that the model runs in, whichever that is; packed, which is
bfloat16 in 13 bits at a head dimension of 128, in 14 at 64, the same to the bit; or in 8 bits."""
DenseFallback = Literal["auto", "never"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def parse_token_count(text: str) -> int:
    """Read a number of tokens: `4096`, `4k` (1,024 each) or `1m`.

    Raises UsageError if it is not a positive whole number.
    """
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*)\s*([kKmM]?)\s*", text)
    count = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if count <= 0:
        raise UsageError(f"'{text}' is no number of tokens: write it like 4096 or 4k.")
    return count


def parse_lengths(values: Iterable[str], option: str) -> tuple[int, ...]:
    """Read lengths given as commas or repeats, each once: `4k` and `4096` are the same.

    Raises UsageError, naming the option, for one that is no number of tokens.
    """
    try:
        return tuple(dict.fromkeys(parse_token_count(text) for text in split_list(values)))
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def split_list(values: Iterable[str]) -> list[str]:
    """Split options given as commas or repeats, without duplicates, in the order given."""
    parts = [part.strip() for value in values for part in str(value).split(",")]
    return list(dict.fromkeys(part for part in parts if part))


@dataclass(frozen=True)
class SparseBudget:
    """How many prompt tokens are selected per decoded token: a number, or a share of the prompt."""

    tokens: int | None = None
    share: Fraction | None = None

    @classmethod
    def parse(cls, text: str) -> SparseBudget:
        """Read `2048`, `2k` or `1.5625%`. Raises UsageError for anything else."""
        text = text.strip()
        if not text.endswith("%"):
            try:
                return cls(tokens=parse_token_count(text))
            except UsageError:
                raise UsageError(
                    f"'{text}' is no sparse budget: write tokens like 2048, or a share of the "
                    "prompt like 1.5625%."
                ) from None
        number = re.fullmatch(
            r"(\d{1,3}(?:\.\d{1,20})?|\.\d{1,20}|\d{1,9}/0*[1-9]\d{0,8})\s*%", text
        )
        share = Fraction(number[1]) / 100 if number else Fraction(0)
        if not 0 < share <= 1:
            raise UsageError(
                f"'{text}' is no sparse budget: write a share above 0% and up to 100%, or tokens."
            )
        return cls(share=share)

    def resolve(self, prompt_tokens: int, chunk_size: int) -> int:
        """Tokens selected for a prompt of that many tokens, a share rounded up to a whole chunk."""
        if self.tokens is not None:
            return self.tokens
        assert self.share is not None
        return math.ceil(self.share * prompt_tokens / chunk_size) * chunk_size

    def __str__(self) -> str:
        if self.tokens is not None:
            return str(self.tokens)
        assert self.share is not None
        percent = self.share * 100
        places = next((n for n in range(24) if (percent * 10**n).denominator == 1), None)
        if places is None:
            return f"{percent}%"
        whole = int(percent * 10**places)
        digits = f"{whole:0{places + 1}d}"
        return (digits[:-places] + "." + digits[-places:] if places else digits) + "%"


@dataclass(frozen=True)
class Kept:
    """What a sparse method attends of a prompt per step, in chunks and tokens, for one KV head."""

    selected_chunks: int
    outlier_chunks: int
    local_tokens: int
    chunk_size: int

    @property
    def selected_tokens(self) -> int:
        return self.selected_chunks * self.chunk_size

    @property
    def outlier_tokens(self) -> int:
        return self.outlier_chunks * self.chunk_size

    @property
    def tokens(self) -> int:
        return self.selected_tokens + self.outlier_tokens + self.local_tokens


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that a KV method depends on."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of that many tokens, all layers."""
        return 2 * self.num_layers * tokens * self.key_width * self.element_bytes


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that a method holds for one sequence: beside the model, and in pinned host memory."""

    device: int
    host: int


def packed_width(head_dim: int) -> int:
    """Bytes of a packed row: a token of a KV head, or a landmark."""
    return PACKED_HEADER_BYTES + head_dim * 3 // 2


def row_bytes(dtype: StoredDtype, shape: ModelShape) -> int:
    """Of a token of a KV head or a landmark, without scales."""
    if dtype == "packed":
        return packed_width(shape.head_dim)
    return shape.head_dim * (1 if dtype == "fp8" else shape.element_bytes)


@dataclass(frozen=True)
class ValueForm:
    """How a prompt's values are kept in a layer.

    Attributes:
        placement: beside the model, or in pinned host memory.
        dtype: what they are kept in.
        chunk_size: tokens of a KV head that share a scale, in fp8; else None.
    """

    placement: Placement
    dtype: StoredDtype = "model"
    chunk_size: int | None = None

    def data_bytes(self, shape: ModelShape, tokens: int) -> int:
        """Of one layer of one prompt, where `placement` says."""
        return tokens * shape.num_kv_heads * row_bytes(self.dtype, shape)

    def scale_bytes(self, shape: ModelShape, tokens: int) -> int:
        """Of the scales of one layer of one prompt, which always lie beside the model."""
        chunks = tokens // self.chunk_size if self.chunk_size else 0
        return chunks * shape.num_kv_heads * SCALE_BYTES


def layer_bytes(forms: Collection[ValueForm], shape: ModelShape, tokens: int) -> CacheBytes:
    """Bytes of the values of one layer of one prompt in several forms."""
    # Scales of one chunk size serve values in both places.
    device = sum({f.chunk_size: f.scale_bytes(shape, tokens) for f in forms}.values())
    device += sum(f.data_bytes(shape, tokens) for f in forms if f.placement == "device")
    return CacheBytes(
        device, sum(f.data_bytes(shape, tokens) for f in forms if f.placement == "host")
    )


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Settings of one KV method. Its fields are the options that the command line may set."""

    name: ClassVar[str]
    help: ClassVar[str]
    keeps_exact: ClassVar[bool] = False
    """Whether all keys and values of a prompt stay beside the model, as it computed them."""

    def settings(self) -> dict[str, Any]:
        """All fields as JSON values, in the order of declaration."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, SparseBudget) else v for k, v in values.items()}

    @property
    def cell(self) -> str:
        """A unique label: the name, then the settings that differ from the defaults."""
        default = type(self)().settings()
        changed = [f"{k}={v}" for k, v in self.settings().items() if v != default[k]]
        return self.name + (":" + ",".join(changed) if changed else "")

    def keeps(self, prompt_tokens: int) -> Kept | None:
        """What is attended per step of a prompt of that length; None where everything is."""
        return None

    def is_dense(self, prompt_tokens: int) -> bool:
        """Whether a prompt of that length is answered with full attention."""
        return True

    def check_model(self, shape: ModelShape, dtype: str) -> None:
        """Raise UsageError where a setting is impossible for a model of that shape and dtype.

        Args:
            shape: of the model.
            dtype: of its weights and cache, like `bfloat16`.
        """

    def cache_bytes(self, shape: ModelShape, prompt_tokens: int, new_tokens: int) -> CacheBytes:
        """What the method holds for one sequence, alone."""
        return CacheBytes(shape.kv_bytes(prompt_tokens + new_tokens), 0)


@dataclass(frozen=True, kw_only=True)
class FullSpec(MethodSpec):
    """Exact attention over the whole prompt: the reference."""

    name: ClassVar[str] = "full"
    help: ClassVar[str] = "exact attention over everything"
    keeps_exact: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class SparseSpec(MethodSpec):
    """Settings that every method shares which attends only part of the prompt.

    Attributes:
        sparse_budget: prompt tokens selected per step and KV head (paper: 1.5625 %, 2,048 of 128K).
        chunk_size: tokens that are selected together (paper: 8).
        outlier_chunks: chunks always attended, or `auto`: 192 tokens per 1,024 of budget.
        local_chunks: chunks at the prompt's end always attended (official code: 4), with the
            remainder that fills no chunk.
        dense_fallback: `auto` answers prompts that are not longer than what is kept with full
            attention; `never` runs the method all the same.
    """

    sparse_budget: SparseBudget = SparseBudget(share=Fraction(1, 64))
    chunk_size: int = 8
    outlier_chunks: int | Literal["auto"] = "auto"
    local_chunks: int = 4
    dense_fallback: DenseFallback = "auto"

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise UsageError(f"chunk_size must be at least 1, not {self.chunk_size}.")
        if self.local_chunks < 0:
            raise UsageError(f"local_chunks must be at least 0, not {self.local_chunks}.")
        if self.outlier_chunks != "auto" and self.outlier_chunks < 0:
            raise UsageError(f"outlier_chunks must be at least 0, not {self.outlier_chunks}.")
        tokens = self.sparse_budget.tokens
        if tokens is not None and tokens % self.chunk_size:
            raise UsageError(
                f"sparse_budget {tokens} is not divisible by chunk_size {self.chunk_size}: "
                f"use {tokens // self.chunk_size * self.chunk_size or self.chunk_size}"
                f" or {(tokens // self.chunk_size + 1) * self.chunk_size}."
            )

    def wanted(self, prompt_tokens: int) -> Kept:
        """What the settings ask for, before it is clipped to the prompt."""
        budget = self.sparse_budget.resolve(prompt_tokens, self.chunk_size)
        if self.outlier_chunks == "auto":
            chunks = budget * OUTLIER_TOKENS_PER_BUDGET / self.chunk_size
            outliers = max(1, math.floor(chunks + Fraction(1, 2)))
        else:
            outliers = self.outlier_chunks
        local = self.local_chunks * self.chunk_size + prompt_tokens % self.chunk_size
        return Kept(budget // self.chunk_size, outliers, local, self.chunk_size)

    def keeps(self, prompt_tokens: int) -> Kept:
        wanted = self.wanted(prompt_tokens)
        local = min(wanted.local_tokens, prompt_tokens)
        chunks = (prompt_tokens - local) // self.chunk_size
        outliers = min(wanted.outlier_chunks, chunks)
        return Kept(
            min(wanted.selected_chunks, chunks - outliers), outliers, local, self.chunk_size
        )

    def is_dense(self, prompt_tokens: int) -> bool:
        return self.dense_fallback == "auto" and self.wanted(prompt_tokens).tokens >= prompt_tokens


def buffer_slots(selected_chunks: int, factor: float) -> int:
    """Slots of a buffer that holds a multiple of the selected chunks, at least these."""
    return max(selected_chunks, math.ceil(selected_chunks * factor))


@dataclass(frozen=True, kw_only=True)
class ShadowKVSpec(SparseSpec):
    """ShadowKV (ICML 2025): low-rank pre-RoPE keys and landmarks stay, values may move to the host.

    Attributes:
        rank: columns of the joint low-rank factorisation of all heads' pre-RoPE keys (paper: 160).
        landmarks_per_chunk: means a chunk is represented by, combined by logsumexp (paper: 1).
        value_placement: where the values of the prompt live: with the model, or pinned on the host.
        value_buffer: chunks of values held beside the model, as a multiple of those selected;
            1 keeps what the last step selected (the paper's policy), more is a larger LRU buffer.
        key_buffer: the same for rebuilt keys.
        value_dtype: of the prompt's values, where they lie and in the buffer; `packed`, which loses
            no bit of bfloat16 and takes 13 of 16 bits at a head dimension of 128, and `fp8` (e4m3,
            one scale a chunk and KV head) become the model's dtype again as they are attended.
        landmark_dtype: of the landmarks; in `fp8` with one scale each; `packed` as values.
        resident_layers: layers whose values stay beside the model though the others' are on the
            host; `auto`, which bench resolves for each batch: as many as fit.
    """

    name: ClassVar[str] = "shadowkv"
    help: ClassVar[str] = "low-rank keys, landmarks, sparse selection (the paper's method)"

    rank: int = 160
    landmarks_per_chunk: int = 1
    value_placement: Placement = "device"
    value_buffer: float = 1.0
    key_buffer: float = 1.0
    value_dtype: StoredDtype = "model"
    landmark_dtype: StoredDtype = "model"
    resident_layers: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}.")
        if self.landmarks_per_chunk not in (1, 2, 4):
            raise UsageError(
                f"landmarks_per_chunk must be 1, 2 or 4, not {self.landmarks_per_chunk}."
            )
        if self.chunk_size % self.landmarks_per_chunk:
            raise UsageError(
                f"chunk_size {self.chunk_size} is not divisible by landmarks_per_chunk "
                f"{self.landmarks_per_chunk}."
            )
        for field in ("value_buffer", "key_buffer"):
            if not 1 <= getattr(self, field) <= MAX_BUFFER:
                raise UsageError(
                    f"{field} must be at least 1 and at most {MAX_BUFFER}, not "
                    f"{getattr(self, field)}."
                )
        if self.resident_layers != "auto" and self.resident_layers < 0:
            raise UsageError(f"resident_layers must be at least 0, not {self.resident_layers}.")
        if self.resident_layers and self.value_placement != "host":
            raise UsageError(
                f"resident_layers {self.resident_layers} has no effect with value_placement "
                f"{self.value_placement}, which keeps all layers there: use host."
            )

    def check_model(self, shape: ModelShape, dtype: str) -> None:
        if self.resident_layers != "auto" and self.resident_layers > shape.num_layers:
            raise UsageError(
                f"resident_layers {self.resident_layers} is above the model's {shape.num_layers} "
                "layers."
            )
        width = shape.key_width
        if self.rank > width:
            raise UsageError(
                f"rank {self.rank} is above the model's key width {width} ({shape.num_kv_heads} KV "
                f"heads of {shape.head_dim}): use --rank {width} or less."
            )
        for name in ("value_dtype", "landmark_dtype"):
            if getattr(self, name) != "packed":
                continue
            option = f"--{name.replace('_', '-')}"
            if dtype != "bfloat16":
                raise UsageError(
                    f"{name} packed holds bfloat16, and the model is in {dtype}: use --dtype "
                    f"bfloat16 or {option} model."
                )
            if shape.head_dim % 8 or not 40 <= shape.head_dim <= LARGEST_PACKED_DIM:
                raise UsageError(
                    f"{name} packed needs a head dimension that is a multiple of 8 from 40, where "
                    f"it begins to save bytes, to {LARGEST_PACKED_DIM}, not {shape.head_dim}: use "
                    f"{option} model."
                )

    def cache_bytes(self, shape: ModelShape, prompt_tokens: int, new_tokens: int) -> CacheBytes:
        if self.is_dense(prompt_tokens):
            return super().cache_bytes(shape, prompt_tokens, new_tokens)
        kept, width = self.keeps(prompt_tokens), shape.key_width
        fixed = kept.outlier_tokens + kept.local_tokens + new_tokens
        elements = width * 2 * fixed + self.rank * (prompt_tokens + width)
        a_layer = elements * shape.element_bytes + self.landmark_bytes(shape, prompt_tokens)
        a_layer += sum(self.buffer_bytes(shape, prompt_tokens))
        a_layer += self.table_bytes(shape, prompt_tokens)
        forms = self.value_forms(shape.num_layers)
        values = [layer_bytes([form], shape, prompt_tokens) for form in forms]
        return CacheBytes(
            shape.num_layers * a_layer + sum(held.device for held in values),
            sum(held.host for held in values),
        )

    def packs(self, part: str) -> bool:
        """Whether its `values` or `landmarks` are packed, which a prompt may forbid."""
        return getattr(self, PACKABLE[part]) == "packed"

    def slots(self, kept: Kept) -> tuple[int, int]:
        """Of the buffers of keys and of values."""
        selected = kept.selected_chunks
        return buffer_slots(selected, self.key_buffer), buffer_slots(selected, self.value_buffer)

    def table_bytes(self, shape: ModelShape, prompt_tokens: int) -> int:
        """Of where each chunk of one layer of one prompt lies, and which are never selected.

        Buffers of one size have one table.
        """
        return self.table_bytes_of(set(self.slots(self.keeps(prompt_tokens))), shape, prompt_tokens)

    def table_bytes_of(self, tables: Iterable[int], shape: ModelShape, prompt_tokens: int) -> int:
        """The same of tables of so many slots."""
        chunks = prompt_tokens // self.chunk_size
        indices = sum(chunks + 2 * slots for slots in tables)
        return shape.num_kv_heads * (indices * INDEX_BYTES + chunks)

    def buffer_bytes(self, shape: ModelShape, prompt_tokens: int) -> tuple[int, int]:
        """Of the buffers of keys and of values of one layer of one prompt."""
        return self.buffer_bytes_of(self.slots(self.keeps(prompt_tokens)), shape)

    def buffer_bytes_of(self, slots: tuple[int, int], shape: ModelShape) -> tuple[int, int]:
        """The same of so many slots of keys and of values."""
        keys, values = slots
        a_chunk = self.chunk_size * shape.key_width
        of_token = shape.num_kv_heads * row_bytes(self.value_dtype, shape)
        scales = shape.num_kv_heads * SCALE_BYTES if self.value_dtype == "fp8" else 0
        return (
            keys * a_chunk * shape.element_bytes,
            values * (self.chunk_size * of_token + scales),
        )

    def value_forms(self, num_layers: int) -> list[ValueForm]:
        """How the values of the prompt are kept, by layer; `auto` counts as no resident layers.

        Those are spread evenly: a layer's fetch hides behind the work of its own layer alone.
        """
        resident = 0 if self.resident_layers == "auto" else self.resident_layers
        before = [layer * resident // num_layers for layer in range(num_layers + 1)]
        size = self.chunk_size if self.value_dtype == "fp8" else None
        return [
            ValueForm("device" if after > count else self.value_placement, self.value_dtype, size)
            for count, after in itertools.pairwise(before)
        ]

    def landmark_bytes(self, shape: ModelShape, tokens: int) -> int:
        """Of the landmarks of one layer of one prompt, with their scales."""
        count = tokens // self.chunk_size * self.landmarks_per_chunk * shape.num_kv_heads
        scale = SCALE_BYTES if self.landmark_dtype == "fp8" else 0
        return count * (row_bytes(self.landmark_dtype, shape) + scale)


@dataclass(frozen=True, kw_only=True)
class OracleSpec(SparseSpec):
    """The chunks that truly hold most attention, exact keys and values: a perfect selector."""

    name: ClassVar[str] = "oracle"
    help: ClassVar[str] = "control: the chunks with the most true attention"
    keeps_exact: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RandomSpec(SparseSpec):
    """Chunks drawn at random for every step and KV head, exact keys and values."""

    name: ClassVar[str] = "random"
    help: ClassVar[str] = "control: chunks drawn at random"
    keeps_exact: ClassVar[bool] = True

    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class StreamingSpec(SparseSpec):
    """The first and the last tokens (StreamingLLM, ICLR 2024), as many as ShadowKV attends."""

    name: ClassVar[str] = "streaming"
    help: ClassVar[str] = "control: attention sinks and recent tokens"

    sink_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_tokens < 0:
            raise UsageError(f"sink_tokens must be at least 0, not {self.sink_tokens}.")

    def cache_bytes(self, shape: ModelShape, prompt_tokens: int, new_tokens: int) -> CacheBytes:
        kept = prompt_tokens if self.is_dense(prompt_tokens) else self.keeps(prompt_tokens).tokens
        return CacheBytes(shape.kv_bytes(kept + new_tokens), 0)


SPECS: dict[str, type[MethodSpec]] = {
    spec.name: spec for spec in (FullSpec, ShadowKVSpec, OracleSpec, RandomSpec, StreamingSpec)
}


def spec_fields(spec: type[MethodSpec]) -> list[str]:
    """Names of the settings that a method has."""
    return [f.name for f in dataclasses.fields(spec)]
