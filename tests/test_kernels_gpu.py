"""Each compiled op against its torch reference on a CUDA device. Run by `make test-gpu`.

The reference is called by name: in float32 for what is exact, in the kernel's dtype for what is
allowed, since a kernel may be twice as wrong. What only moves data must be equal to the bit.
"""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.ops import cases, compiled, layer_cases
from shadowkv_cli.ops.await_rows import Progress
from shadowkv_cli.ops.fp8 import dequantise
from shadowkv_cli.ops.packed import MOST_STRAYS, NAN_BYTE, pack, stray_counts, unpack
from shadowkv_cli.ops.sizes import Sizes, random_sizes

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEPT_IN: dict[str, dict[str, Any]] = {
    "model": {},
    "fp8": {"fp8": True},
    "packed": {"packed": True, "dtype": BF16},
}
"""What makes sizes of each."""

GRID = [
    Sizes(device=DEVICE),
    Sizes(device=DEVICE, dtype=FP16, dim=128, group=1, heads=8, pairs=64, rank=160),
    Sizes(device=DEVICE, dtype=FP32, dim=96, group=3, pairs=48, interleaved=True),
    Sizes(device=DEVICE, dim=96, group=5, chunk_size=3, rank=3, spare=1, pairs=24),
    Sizes(device=DEVICE, dim=128, group=7, landmarks=2, chunk_size=2, rank=17, spare=0, pairs=5),
    Sizes(device=DEVICE, dtype=FP16, group=16, landmarks=4, chunk_size=64, fixed=(0, 0, 0)),
    Sizes(device=DEVICE, dtype=FP32, dim=128, group=16, chunk_size=1, chunks=600, wanted=300,
          slots=700, rows=2, prompts=1),
    Sizes(device=DEVICE, rows=24, prompts=24, heads=8, dim=128, pairs=64, wanted=40, slots=80,
          chunks=1100, rank=160),
    Sizes(device=DEVICE, rows=1, prompts=1, heads=1, group=2, wanted=1, slots=1, chunks=1,
          chunk_size=1, rank=1),
    Sizes(device=DEVICE, rows=4, prompts=1, group=12, chunk_size=37, chunks=70, fixed=(0, 3)),
]  # fmt: skip
SIZES = [*GRID, *(random_sizes(seed, device=DEVICE) for seed in range(16))]
MANY_MISSES = Sizes(device=DEVICE, rows=8, heads=8, chunk_size=1, chunks=700, wanted=600, slots=800)
"""Of which a block of `fetch_values` from the host gets more than it finds at a time."""
MANY_PLANES = Sizes(device=DEVICE, rows=960, prompts=5, heads=8, wanted=3, slots=4)
"""Of which `fetch_values` cannot list the misses beside what a block copies in bulk."""
IN_PIECES = [
    Sizes(device=DEVICE, dim=96, pairs=48, chunk_size=8, rows=6, wanted=30, slots=40),
    Sizes(device=DEVICE, dim=128, pairs=64, chunk_size=5, rows=6, wanted=30, slots=40, dtype=FP16),
    Sizes(device=DEVICE, dim=64, chunk_size=16, rows=6, wanted=30, slots=40, dtype=FP32),
]
"""Of whose chunks the last piece that is copied in bulk is shorter, or not."""
HIGH_RANKS = [
    Sizes(device=DEVICE, dim=128, pairs=64, rank=161, wanted=20, slots=30,
          poison=False),
    Sizes(device=DEVICE, dim=96, pairs=48, rank=333, spare=1, dtype=FP16, interleaved=True),
    Sizes(device=DEVICE, rank=1024, prompts=1),
]  # fmt: skip
"""More columns than a block of `rebuild_keys` has under way at a time."""


def case_name(sizes: Sizes) -> str:
    return f"{str(sizes.dtype)[6:]}-d{sizes.dim}-g{sizes.group}-c{sizes.chunk_size}-{sizes.seed}"


ODD = [
    Sizes(device=DEVICE, dim=dim, pairs=pairs, spare=spare, heads=heads, group=group, dtype=dtype,
          prompts=prompts, interleaved=interleaved, chunks=5)
    for dtype in (BF16, FP16, FP32)
    for dim, pairs, spare, heads, group, prompts, interleaved in (
        (80, 40, 0, 2, 4, 1, False),  # whole words, and another head dimension
        (80, 16, 8, 2, 4, 2, True),
        (128, 64, 1, 2, 4, 1, False),  # aligned in itself, but not from row to row
        (7, 2, 0, 3, 1, 2, True),
        (7, 3, 3, 1, 3, 1, False),
        (5, 0, 0, 1, 1, 1, False),  # rows of 5, and nothing to rotate
        (2, 1, 0, 1, 1, 2, True),
        (1, 0, 0, 3, 1, 1, False),
        (128, 64, 0, 4, 16, 1, True),  # rows of 8,192
        (128, 64, 0, 8, 16, 1, False),  # and 16,384
        (128, 64, 8, 8, 20, 2, False),  # and 20,480
    )
]  # fmt: skip
ANY_SIZES = [*SIZES, *ODD]
"""Also for ops that work on elements one by one."""

every_size = pytest.mark.parametrize("sizes", SIZES, ids=case_name)
any_size = pytest.mark.parametrize("sizes", ANY_SIZES, ids=case_name)
every_op = pytest.mark.parametrize("name", cases.ARGUMENTS)


def reference(name: str, arguments: dict[str, Any]) -> Any:
    return importlib.import_module(f"shadowkv_cli.ops.{name}")._reference(*arguments.values())


def kernel(name: str, arguments: dict[str, Any]) -> Any:
    """The compiled op, its outputs in memory that held NaN or ones before."""
    freed = [torch.full((size,), math.nan, device=DEVICE) for size in (64, 4096, 1 << 18, 1 << 22)]
    freed += [torch.full((size,), 0x7F, dtype=torch.uint8, device=DEVICE) for size in (64, 4096)]
    del freed
    return getattr(torch.ops.shadowkv, name)(*arguments.values())


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of their own, strides kept."""

    def own(x: Tensor) -> Tensor:
        storage = torch.empty_like(x, memory_format=torch.preserve_format)
        if storage.stride() != x.stride():
            size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            storage = x.new_empty(size).as_strided(x.shape, x.stride())
        return storage.copy_(x)

    return {k: own(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def in_float32(arguments: dict[str, Any]) -> dict[str, Any]:
    """But for a buffer in fp8, which is attended as what it stands for."""

    def wide(v: Any) -> Any:
        return v.float() if isinstance(v, Tensor) and v.is_floating_point() else v

    return {k: v if k == "value_buffer" else wide(v) for k, v in arguments.items()}


def assert_close(found: Tensor, plain: Tensor, exact: Tensor, case: object) -> None:
    """At most twice as wrong as the reference in the same dtype, plus an ulp of the largest."""
    assert found.shape == exact.shape, case
    assert found.dtype == plain.dtype, case
    if not exact.numel():
        return
    rounding = max(torch.finfo(found.dtype).eps, 4e-6)
    floor = float(exact.abs().max()) * rounding
    error, allowed = (float((x.float() - exact).abs().max()) for x in (found, plain))
    assert error <= 2 * allowed + floor, (case, error, allowed)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_the_kernels_are_there() -> None:
    assert compiled.ABSENT == ""


@every_size
def test_build_landmarks(sizes: Sizes) -> None:
    arguments = cases.landmark_arguments(sizes)
    found, plain = kernel("build_landmarks", arguments), reference("build_landmarks", arguments)
    exact = reference("build_landmarks", in_float32(arguments))
    assert_close(found[0], plain[0], exact[0], sizes)
    assert torch.allclose(found[1], exact[1], atol=1e-5), sizes


def best_of_group(arguments: dict[str, Any]) -> Tensor:
    """float32 [R, Hk, C]: the scores that select; minus infinity where a chunk is barred."""
    wide = in_float32(arguments)
    beyond = torch.arange(wide["excluded"].shape[2], device=DEVICE) >= wide["num_chunks"][:, None]
    barred = (wide["excluded"] | beyond[:, None])[:, :, None]
    module = importlib.import_module("shadowkv_cli.ops.select_chunks")
    scores = module.landmark_scores(
        wide["query"],
        wide["landmarks"],
        wide["landmark_scales"],
        wide["prompt_index"],
        wide["scale"],
    )
    scores = scores.masked_fill(barred, -math.inf).log_softmax(-1)
    return scores.masked_fill(barred, -math.inf).amax(2)


SELECTIONS = [
    *SIZES,
    *(
        Sizes(device=DEVICE, rows=rows, dim=dim, group=group, landmarks=landmarks,
              chunk_size=chunk_size, chunks=chunks, wanted=wanted, dtype=dtype)
        for rows, dim, group, landmarks, chunk_size, chunks, wanted, dtype in (
            # One kernel of clusters: shares of eight blocks that are even, odd, empty.
            (5, 128, 4, 1, 4, 15_360, 256, BF16),
            (5, 128, 8, 2, 4, 4100, 300, FP16),
            (2, 128, 7, 1, 4, 15_000, 300, BF16),
            (5, 64, 9, 4, 4, 1999, 1999, BF16),
            (5, 96, 1, 1, 4, 65, 64, FP16),
            (5, 96, 4, 1, 4, 12_000, 256, BF16),
            (5, 64, 16, 2, 4, 7, 7, BF16),
            # Two kernels: three and more than four landmarks, too many chunks for shared memory.
            (3, 128, 4, 3, 3, 2000, 300, BF16),
            (3, 64, 7, 8, 8, 500, 30, FP16),
            (3, 96, 3, 16, 16, 300, 30, BF16),
            (3, 64, 16, 1, 1, 12_300, 700, BF16),
            (3, 64, 1, 1, 1, 70_000, 700, FP16),
        )
    ),
]  # fmt: skip


def assert_selected(ids: Tensor, arguments: dict[str, Any], case: object) -> None:
    """Unique, ascending, as many as exist, none below the k-th by more than an epsilon."""
    scores, wanted = best_of_group(arguments), arguments["max_chunks"]
    assert ids.shape == (*scores.shape[:2], wanted)
    budgets = arguments["budget_chunks"].tolist()
    for r, h in itertools.product(*map(range, scores.shape[:2])):
        own, row = scores[r, h], ids[r, h].tolist()
        found = [c for c in row if c >= 0]
        allowed = int((own > -math.inf).sum())
        where = (case, r, h)
        assert row == found + [-1] * (wanted - len(found)), where
        assert found == sorted(set(found)), where
        assert len(found) == max(min(budgets[r], wanted, allowed), 0), where
        if found:
            kth = float(own.sort(descending=True).values[len(found) - 1])
            lowest = float(own[torch.tensor(found, device=DEVICE)].min())
            assert lowest >= kth - 1e-4 * max(1.0, abs(kth)), where


@pytest.mark.parametrize("sizes", SELECTIONS, ids=case_name)
@pytest.mark.parametrize("fp8", [False, True])
def test_select_chunks(sizes: Sizes, fp8: bool) -> None:
    sizes = replace(sizes, fp8=fp8)
    arguments = cases.select_arguments(sizes)
    assert_selected(kernel("select_chunks", arguments), arguments, sizes)


@pytest.mark.parametrize("sizes", SELECTIONS, ids=case_name)
def test_packed_landmarks_select_as_what_they_stand_for(sizes: Sizes) -> None:
    """The same products, so the same ids; strays and NaN in what is excluded included."""
    arguments = cases.select_arguments(replace(sizes, packed=True, dtype=BF16))
    expected = kernel("select_chunks", arguments | {"landmarks": unpack(arguments["landmarks"])})
    arguments["done"].zero_()
    assert torch.equal(kernel("select_chunks", arguments), expected), sizes


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("landmarks", [1, 3])  # in one kernel, and in two
def test_select_chunks_unpacks_every_place(dim: int, group: int, landmarks: int) -> None:
    """Landmarks of which one element counts, at every place, as a stray or not."""
    g = torch.Generator(DEVICE).manual_seed(dim)
    chunks, counts = 4 * dim, torch.arange(4 * dim, device=DEVICE)
    sizes = Sizes(
        rows=3, prompts=1, heads=2, group=group, dim=dim, chunks=chunks, wanted=40, poison=False,
        landmarks=landmarks, chunk_size=landmarks, device=DEVICE,
    )  # fmt: skip
    arguments = cases.select_arguments(sizes)
    held = arguments["landmarks"]
    exponents = torch.randint(-3, 3, held.shape, generator=g, device=DEVICE)
    held = torch.randn(held.shape, generator=g, device=DEVICE) * 2.0**exponents
    large = 2.0 ** torch.randint(11, 15, (chunks,), generator=g, device=DEVICE)
    held[:, :, counts, :, counts % dim] *= large[None, None, :, None].transpose(0, 2)
    own = held.to(BF16)
    fits = (stray_counts(own) <= MOST_STRAYS)[..., None]
    own = torch.where(fits, own, torch.ones_like(own))
    assert float((stray_counts(own) > 0).float().mean()) > 0.02
    packed = pack(own)
    arguments["query"][1] = 0
    arguments["query"][1, :, dim // 3] = 1
    plain = kernel("select_chunks", arguments | {"landmarks": own})
    arguments["done"].zero_()
    assert torch.equal(kernel("select_chunks", arguments | {"landmarks": packed}), plain)


@pytest.mark.parametrize("landmarks", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [-1, 0, 5, 90_000])
def test_select_chunks_takes_any_budget(landmarks: int, budget: int) -> None:
    """Also counts of chunks that are none, or more than there are."""
    sizes = Sizes(device=DEVICE, rows=6, chunks=600, chunk_size=12, landmarks=landmarks, wanted=650)
    arguments = cases.select_arguments(sizes)
    arguments["budget_chunks"].fill_(budget)
    arguments["num_chunks"][1:4] = torch.tensor([0, -3, 9000], device=DEVICE)
    assert_selected(kernel("select_chunks", arguments), arguments, sizes)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("landmarks", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [10, 3000, 40_000, 70_000])
def test_select_chunks_gives_ties_to_the_lower_id(
    chunks: int, landmarks: int, dtype: torch.dtype
) -> None:
    """More equal keys than are compared with each other, in shared and in global memory."""
    sizes = Sizes(rows=2, prompts=1, heads=1, chunks=chunks, wanted=7, dtype=dtype, device=DEVICE,
                  landmarks=landmarks, chunk_size=landmarks, poison=False)  # fmt: skip
    arguments = cases.select_arguments(sizes)
    arguments["landmarks"] = torch.ones_like(arguments["landmarks"])
    arguments["excluded"] = torch.zeros_like(arguments["excluded"])
    arguments["excluded"][:, :, 2] = True
    assert kernel("select_chunks", arguments).tolist() == [[[0, 1, 3, 4, 5, 6, 7]]] * 2


@pytest.mark.parametrize("landmarks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("chunks", "wanted"), [(3000, 150), (3000, 1100), (3000, 2300), (9000, 1100), (9000, 5000)]
)
def test_select_chunks_among_few_different_scores(chunks: int, wanted: int, landmarks: int) -> None:
    """The cut lies among equal keys of several blocks, few or many; those in front are chosen."""
    sizes = Sizes(rows=1, prompts=1, heads=1, group=1, chunks=chunks, wanted=wanted, device=DEVICE,
                  landmarks=landmarks, chunk_size=landmarks, poison=False)  # fmt: skip
    arguments = cases.select_arguments(sizes)
    value = (torch.arange(chunks, device=DEVICE) * 7 % 13 % 4).to(BF16) / 4
    arguments["landmarks"] = value.view(1, 1, -1, 1, 1).expand_as(arguments["landmarks"]).clone()
    arguments["query"] = torch.ones_like(arguments["query"])
    arguments["excluded"] = torch.zeros_like(arguments["excluded"])
    best = value.float().argsort(descending=True, stable=True)[:wanted].sort().values
    assert kernel("select_chunks", arguments)[0, 0].tolist() == best.tolist()


@pytest.mark.parametrize("landmarks", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_select_chunks_leaves_out_heads_that_are_no_numbers(value: float, landmarks: int) -> None:
    """In one kernel as in two: the group's other query heads select; where none is left, -1."""
    sizes = Sizes(rows=2, prompts=1, heads=1, group=3, chunks=900, wanted=50, device=DEVICE,
                  landmarks=landmarks, chunk_size=landmarks, poison=False)  # fmt: skip
    arguments = cases.select_arguments(sizes)
    others = arguments | {"query": arguments["query"][:, 1:].contiguous()}
    arguments["query"][:, 0, 5] = value
    for_others = kernel("select_chunks", others)
    assert (for_others >= 0).all()
    assert torch.equal(kernel("select_chunks", arguments), for_others)
    arguments["query"][:, :, 5] = value
    assert (kernel("select_chunks", arguments) == -1).all()


@pytest.mark.parametrize("kept_in", KEPT_IN)
@pytest.mark.parametrize(
    ("rows", "chunks", "group", "dim"),
    [
        (24, 15_360, 4, 128),
        (48, 3000, 4, 128),
        (24, 3000, 8, 128),
        (24, 3000, 16, 128),
        (8, 15_360, 8, 128),
        (6, 9000, 16, 128),
        (8, 15_360, 4, 96),
        (8, 15_360, 4, 64),
    ],
)
def test_select_chunks_chooses_beside_others_what_it_chooses_alone(
    rows: int, chunks: int, group: int, dim: int, kept_in: str
) -> None:
    """More planes than run at once: some rank their chunks, with atomics, while others read."""
    sizes = Sizes(rows=rows, prompts=rows, heads=8, group=group, dim=dim, chunks=chunks, wanted=200,
                  poison=False, device=DEVICE, **KEPT_IN[kept_in])  # fmt: skip
    arguments = cases.select_arguments(sizes)
    own = ("query", "prompt_index", "num_chunks", "excluded", "budget_chunks", "done")
    alone = []
    for row in range(rows):
        alone.append(
            kernel("select_chunks", arguments | {k: arguments[k][row : row + 1] for k in own})
        )
        torch.cuda.synchronize()
    for _ in range(20):
        assert torch.equal(kernel("select_chunks", arguments), torch.cat(alone))


@every_size
def test_update_residency(sizes: Sizes) -> None:
    """Equal to the bit over steps, with rows that may use fewer slots than there are."""
    tables = cases.residency_arguments(sizes)
    beyond = (
        torch.arange(sizes.slots, device=DEVICE)
        >= sizes.wanted + torch.arange(sizes.rows, device=DEVICE)[:, None]
    )
    tables["last_used"].masked_fill_(beyond[:, None], torch.iinfo(torch.int32).max)
    theirs = copied(tables)
    for step in range(1, 6):
        now = cases.residency_arguments(replace(sizes, seed=sizes.seed + step), step)
        for side in (tables, theirs):
            side |= {"ids": now["ids"], "step": now["step"]}
        found, wanted = kernel("update_residency", tables), reference("update_residency", theirs)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b), (sizes, step)
        for key in ("chunk_of_slot", "last_used", "slot_of_chunk"):
            assert torch.equal(tables[key], theirs[key]), (sizes, step, key)


@pytest.mark.parametrize("sizes", [*SIZES, MANY_MISSES, MANY_PLANES, *IN_PIECES], ids=case_name)
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kept_in", KEPT_IN)
def test_fetch_values(sizes: Sizes, pinned: bool, kept_in: str) -> None:
    """Equal to the bit, and so are the scales of what is in fp8."""
    sizes = replace(sizes, **KEPT_IN[kept_in])
    arguments = cases.fetch_arguments(sizes, pinned=pinned and DEVICE == "cuda")
    theirs = copied(arguments)
    kernel("fetch_values", arguments)
    reference("fetch_values", theirs)
    for name in ("buffer", "buffer_scales") if sizes.fp8 else ("buffer",):
        assert same_bits(arguments[name], theirs[name]), (name, sizes)


@pytest.mark.parametrize("kept_in", KEPT_IN)
@pytest.mark.parametrize("chunk_size", [8, 32])  # one piece of a chunk, and several
def test_fetches_that_take_turns_move_what_each_moves_alone(kept_in: str, chunk_size: int) -> None:
    turns = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    sizes = Sizes(
        rows=6, heads=8, dim=128, chunk_size=chunk_size, chunks=200, wanted=60, slots=70,
        device=DEVICE, poison=False, **KEPT_IN[kept_in],
    )  # fmt: skip
    beside = [cases.fetch_arguments(replace(sizes, seed=i), pinned=True) for i in range(8)]
    theirs = [copied(arguments) for arguments in beside]
    streams = [torch.cuda.Stream(DEVICE) for _ in beside]
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, arguments in zip(streams, beside, strict=True):
            with torch.cuda.stream(stream):
                kernel("fetch_values", arguments | {"turns": turns})
    torch.cuda.synchronize()
    for arguments, expected in zip(beside, theirs, strict=True):
        reference("fetch_values", expected)
        for name in ("buffer", "buffer_scales") if sizes.fp8 else ("buffer",):
            assert same_bits(arguments[name], expected[name]), name
    taken, passed = turns.tolist()
    assert taken == passed
    if torch.cuda.get_device_capability(DEVICE) >= (9, 0):
        assert taken >= 8 * 3, "at least a warp of each call reads"


@pytest.mark.parametrize(("dim", "chunk_size"), [(1, 1), (2, 3), (4, 5), (12, 2), (16, 1), (80, 8)])
def test_fetch_values_in_fp8_of_any_size(dim: int, chunk_size: int) -> None:
    """Where words of 16 or of 4 bytes do not fit, too."""
    sizes = Sizes(dim=dim, chunk_size=chunk_size, fp8=True, device=DEVICE)
    for pinned in (False, DEVICE == "cuda"):
        arguments = cases.fetch_arguments(sizes, pinned=pinned)
        theirs = copied(arguments)
        kernel("fetch_values", arguments)
        reference("fetch_values", theirs)
        for name in ("buffer", "buffer_scales"):
            assert same_bits(arguments[name], theirs[name]), (name, sizes, pinned)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_attention_widens_every_byte(dtype: torch.dtype, dim: int) -> None:
    """All numbers of e4m3, times scales of every size: one token alone is attended as it is."""
    scales = 10.0 ** torch.arange(-7, 2, device=DEVICE, dtype=torch.float32)
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    numbers[(numbers & 0x7F) == 0x7F] = 0  # NaN
    held = numbers.repeat(9 * dim // 32, 1).view(torch.float8_e4m3fn).view(-1, 1, dim)
    count = held.shape[0]
    given = {"dtype": torch.int32, "device": DEVICE}
    slots = torch.arange(count, **given).flip(0).view(count, 1, 1).contiguous()
    buffer = held.view(1, 1, count, 1, dim).expand(count, -1, -1, -1, -1).contiguous()
    of_slot = scales[torch.arange(count, device=DEVICE) % 9].view(1, 1, -1)
    of_slot = of_slot.expand(count, -1, -1).contiguous()
    keys = torch.randn(count, 1, count, dim, device=DEVICE).to(dtype)
    found, _ = torch.ops.shadowkv.sparse_attention(
        torch.randn(count, 2, dim, device=DEVICE).to(dtype), keys, keys[:, :, :0], slots, slots,
        torch.zeros(count, 1, **given), [0], 1, 1.0, buffer, of_slot,
    )  # fmt: skip
    expected = dequantise(held[:, 0], of_slot[0, 0]).to(dtype).flip(0)[:, None].expand(-1, 2, -1)
    rounding = 0.0 if dtype != FP32 else torch.finfo(FP32).eps
    assert torch.allclose(found, expected, rtol=rounding, atol=0)


def unpacked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with the values of a packed buffer behind the fixed part."""
    slots = unpack(arguments["value_buffer"]).flatten(2, 3)
    return arguments | {
        "values": torch.cat((arguments["values"], slots), 2),
        "value_buffer": None,
    }


@every_size
def test_packed_values_are_attended_as_what_they_stand_for(sizes: Sizes) -> None:
    """To the bit, so that all other tests of attention hold for them."""
    arguments = cases.sparse_arguments(replace(sizes, packed=True, dtype=BF16))
    found = kernel("sparse_attention", arguments)
    for a, b in zip(found, kernel("sparse_attention", unpacked(arguments)), strict=True):
        assert same_bits(a, b), sizes


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("chunk_size", [1, 8])
def test_attention_unpacks_every_element(dim: int, chunk_size: int) -> None:
    """Every exponent and code, zeros and subnormal numbers, and as many strays as fit."""
    g = torch.Generator(DEVICE).manual_seed(dim)
    given = {"generator": g, "device": DEVICE}
    count = 600 * chunk_size
    top = torch.randint(1, 127, (count, 1), **given)  # all but the last bit of the exponents
    upper = (top - torch.randint(0, 8, (count, dim), **given)).clamp_min(0)
    strays = torch.randint(0, MOST_STRAYS + 1, (count,), **given)
    order = torch.rand(count, dim, **given).argsort(1)
    low = torch.randint(0, 127, (count, dim), **given) % top
    upper = torch.where(order < strays[:, None], low, upper)
    upper.scatter_(1, order.argmax(1, keepdim=True), top)
    bits = upper << 8 | torch.randint(0, 256, (count, dim), **given)
    bits[order == 0] = 0
    bits |= torch.randint(0, 2, (count, dim), **given) << 15
    values = bits.to(torch.int16).view(BF16)
    packed = pack(values)
    assert int(packed[:, 1].max()) == MOST_STRAYS
    slots = torch.randperm(600, **given).to(torch.int32).view(600, 1, 1)
    buffer = packed.view(1, 1, 600, chunk_size, -1).expand(600, -1, -1, -1, -1).contiguous()
    keys = torch.randn(600, 1, count, dim, **given).to(BF16)
    arguments = {
        "query": torch.randn(600, 2, dim, **given).to(BF16),
        "keys": keys,
        "values": keys[:, :, :0],
        "key_slots": slots,
        "value_slots": slots,
        "lengths": torch.zeros(600, 1, dtype=torch.int32, device=DEVICE),
        "capacities": [0],
        "chunk_size": chunk_size,
        "scale": 1.0,
        "value_buffer": buffer,
        "value_scales": None,
    }
    found, _ = kernel("sparse_attention", arguments)
    expected, _ = kernel("sparse_attention", unpacked(arguments))
    assert same_bits(found, expected)
    if chunk_size == 1:
        own = values[slots.flatten().long()]
        normal = own.abs() >= torch.finfo(BF16).tiny
        assert torch.equal(found[:, 0][normal], own[normal]), "one token alone is its own average"


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_packed_values_go_with_bfloat16_alone(dtype: torch.dtype) -> None:
    arguments = cases.sparse_arguments(Sizes(packed=True, device=DEVICE))
    for name in ("query", "keys", "values"):
        arguments[name] = arguments[name].to(dtype)
    with pytest.raises(RuntimeError, match="bfloat16"):
        torch.ops.shadowkv.sparse_attention(*arguments.values())
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [2, 5, 16])
def test_fetch_values_moves_any_bytes(dtype: torch.dtype, dim: int) -> None:
    arguments = cases.fetch_arguments(Sizes(dim=dim, chunk_size=3, dtype=dtype, device=DEVICE))
    theirs = copied(arguments)
    kernel("fetch_values", arguments)
    reference("fetch_values", theirs)
    assert same_bits(arguments["buffer"], theirs["buffer"])


@pytest.mark.parametrize("sizes", [*SIZES, *HIGH_RANKS], ids=case_name)
def test_rebuild_keys(sizes: Sizes) -> None:
    arguments = cases.rebuild_arguments(sizes)
    plain, exact = copied(arguments), in_float32(copied(arguments))
    kernel("rebuild_keys", arguments)
    reference("rebuild_keys", plain)
    reference("rebuild_keys", exact)
    written = ~exact["buffer"].isnan()
    assert torch.equal(~arguments["buffer"].isnan(), written), "only missing chunks are written"
    found, plain, exact = (x["buffer"][written] for x in (arguments, plain, exact))
    assert_close(found, plain, exact, sizes)


@every_size
def test_full_attention(sizes: Sizes) -> None:
    arguments = cases.full_arguments(sizes)
    found, plain = kernel("full_attention", arguments), reference("full_attention", arguments)
    exact = reference("full_attention", in_float32(arguments))
    some = arguments["lengths"] > 0
    assert_close(found[some], plain[some], exact[some], sizes)
    assert not found[~some].any(), "a row of no tokens is zeros"


@every_size
@pytest.mark.parametrize("fp8", [False, True])
def test_sparse_attention(sizes: Sizes, fp8: bool) -> None:
    sizes = replace(sizes, fp8=fp8)
    arguments = cases.sparse_arguments(sizes)
    found, plain = kernel("sparse_attention", arguments), reference("sparse_attention", arguments)
    exact = reference("sparse_attention", in_float32(arguments))
    fixed = (arguments["lengths"].sum(1) > 0)[:, None]
    some = (fixed | (arguments["key_slots"] >= 0).any(2)).repeat_interleave(sizes.group, 1)
    assert_close(found[0][some], plain[0][some], exact[0][some], sizes)
    assert torch.allclose(found[1][some], exact[1][some], rtol=1e-5, atol=1e-5), sizes
    assert not found[0][~some].any()
    assert (found[1][~some] == -math.inf).all()


@any_size
@pytest.mark.parametrize("name", ["rms_norm", "gated_silu"])
def test_ops_on_rows(name: str, sizes: Sizes) -> None:
    arguments = cases.ARGUMENTS[name](sizes)
    found, plain = kernel(name, arguments), reference(name, arguments)
    assert found.is_contiguous()
    assert_close(found, plain, reference(name, in_float32(arguments)), sizes)


@pytest.mark.parametrize("name", ["rms_norm", "gated_silu"])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0), (3, 1, 2, 6), (4097, 64), (70_000, 8)])
def test_ops_on_rows_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    """Also views whose leading dimensions are swapped, repeated or left out."""
    g = torch.Generator(DEVICE).manual_seed(0)
    x, weight = (
        torch.randn(size, generator=g, device=DEVICE).to(BF16) for size in (shape, shape[-1:])
    )
    views = [x, x[None], x.expand(2, *shape), x[None].expand(2, 3, *shape)]
    views += [x.transpose(0, -2)] if len(shape) > 2 else []
    for view in views:
        arguments = {"gate": view, "up": view.flip(-1)}
        if name == "rms_norm":
            arguments = {"x": view, "weight": weight, "eps": 1e-6}
        found, plain = kernel(name, arguments), reference(name, arguments)
        exact = reference(name, in_float32(arguments))
        assert found.is_contiguous()
        assert_close(found, plain, exact, (shape, view.stride()))


@pytest.mark.parametrize("width", [64, 4096, 5000, 16_384])
def test_other_rows_change_no_bit_of_a_norm(width: int) -> None:
    arguments = layer_cases.norm_arguments(
        Sizes(device=DEVICE, dim=width, heads=1, group=1, rows=40, spare=0, poison=False)
    )
    expected = kernel("rms_norm", arguments)
    alone = arguments | {"x": arguments["x"][7, 1]}
    assert same_bits(kernel("rms_norm", alone), expected[7, 1])


@any_size
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_rotate_heads(sizes: Sizes, tokens: int) -> None:
    """Equal to the bit: the float32 arithmetic is that of torch."""
    arguments = layer_cases.rotate_arguments(sizes, tokens=tokens)
    found, plain = kernel("rotate_heads", arguments), reference("rotate_heads", arguments)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.is_contiguous()
        assert same_bits(ours, theirs), sizes


@any_size
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_rotate_heads_in_place(sizes: Sizes, tokens: int) -> None:
    """Where they lie, between columns that nobody may touch."""
    arguments = layer_cases.rotate_arguments(sizes, tokens=tokens)
    expected = kernel("rotate_heads", arguments)
    around = arguments["query"]._base
    assert around is not None
    before = around.clone()
    kernel("rotate_heads_", arguments)
    for name, turned in zip(("query", "key"), expected, strict=True):
        assert same_bits(arguments[name], turned), sizes
        arguments[name].zero_()
        before.as_strided(
            arguments[name].shape, arguments[name].stride(), arguments[name].storage_offset()
        ).zero_()
    assert same_bits(around, before)


@pytest.mark.parametrize("empty", ["query", "key", "rows", "tokens"])
def test_rotate_heads_of_nothing(empty: str) -> None:
    arguments = layer_cases.rotate_arguments(Sizes(device=DEVICE))
    if empty in ("query", "key"):
        arguments[empty] = arguments[empty][:, :0]
    else:
        for name in ("query", "key", "cos", "sin"):
            x = arguments[name]
            arguments[name] = x[:0] if empty == "rows" else x[..., :0, :]
    found, plain = kernel("rotate_heads", arguments), reference("rotate_heads", arguments)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.shape == theirs.shape
        assert same_bits(ours, theirs)
    kernel("rotate_heads_", arguments)
    for name, theirs in zip(("query", "key"), plain, strict=True):
        assert same_bits(arguments[name], theirs)


@any_size
def test_append_tokens(sizes: Sizes) -> None:
    arguments = layer_cases.append_arguments(sizes)
    theirs = copied(arguments)
    kernel("append_tokens", arguments)
    reference("append_tokens", theirs)
    for name in ("keys", "values"):
        assert same_bits(arguments[name], theirs[name]), sizes


def test_append_tokens_passes_over_what_lies_outside() -> None:
    sizes = Sizes(device=DEVICE, rows=6, prompts=3, chunks=4)
    arguments = layer_cases.append_arguments(sizes)
    room, index = arguments["keys"].shape[2], {"dtype": torch.int32, "device": DEVICE}
    arguments["plane"] = torch.tensor([0, 3, -1, 1, 1, 2], **index)
    arguments["place"] = torch.tensor([-1, 0, 0, room + 3, room, room - 1], **index)
    theirs = copied(arguments)
    kernel("append_tokens", arguments)
    theirs["keys"][2, :, room - 1] = theirs["key"][5]
    theirs["values"][2, :, room - 1] = theirs["value"][5]
    theirs["values"][1, :, room] = theirs["value"][4]
    for name in ("keys", "values"):
        assert same_bits(arguments[name], theirs[name]), name


@pytest.mark.parametrize("kept_in", KEPT_IN)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_neither_slots_nor_other_rows_change_a_bit(dtype: torch.dtype, kept_in: str) -> None:
    sizes = Sizes(rows=4, wanted=40, slots=60, dim=128, dtype=dtype, device=DEVICE)
    sizes = replace(sizes, **KEPT_IN[kept_in])
    arguments = cases.sparse_arguments(sizes)
    expected = kernel("sparse_attention", arguments)
    moved, fixed = dict(arguments), sum(sizes.fixed)

    def in_larger(buffer: Tensor, order: Tensor) -> Tensor:
        is_packed = buffer.dtype == torch.uint8
        nothing = torch.full_like(buffer.float(), NAN_BYTE if is_packed else math.nan)
        larger = torch.cat((nothing, nothing), 2).to(buffer.dtype)
        larger.view(torch.uint8)[:, :, order + 3] = buffer.contiguous().view(torch.uint8)
        return larger

    for name, slots in (("keys", "key_slots"), ("values", "value_slots")):
        space, old = arguments[name], arguments[slots]
        order = torch.randperm(sizes.slots, device=DEVICE)
        if name == "values" and kept_in != "model":
            moved["value_buffer"] = in_larger(arguments["value_buffer"], order)
        if name == "values" and sizes.fp8:
            scales = torch.full_like(arguments["value_scales"], math.nan).repeat(1, 1, 2)
            scales[:, :, order + 3] = arguments["value_scales"]
            moved["value_scales"] = scales
        if name == "keys" or kept_in == "model":
            buffer = space[:, :, fixed:].unflatten(2, (-1, sizes.chunk_size))
            larger = in_larger(buffer, order)
            moved[name] = torch.cat((space[:, :, :fixed], larger.flatten(2, 3)), 2)
        new = order[old.clamp_min(0).long()] + 3
        moved[slots] = new.masked_fill(old < 0, -1).to(torch.int32)
    for a, b in zip(kernel("sparse_attention", moved), expected, strict=True):
        assert same_bits(a, b)
    alone = {k: v[2:3] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for a, b in zip(kernel("sparse_attention", alone), expected, strict=True):
        assert same_bits(a, b[2:3])


def outputs(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """What an op returns, and its tensors that it may have changed."""
    found = kernel(name, arguments)
    returned = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
    return [*returned, *(v for v in arguments.values() if isinstance(v, Tensor))]


@pytest.mark.parametrize(
    ("name", "kept_in"),
    [
        *((name, "model") for name in cases.ARGUMENTS),
        *((name, "fp8") for name in ("fetch_values", "select_chunks", "sparse_attention")),
        *((name, "packed") for name in ("fetch_values", "select_chunks", "sparse_attention")),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_graph_serves_other_inputs(name: str, kept_in: str, dtype: torch.dtype) -> None:
    """Captured once, replayed with other tensors in the same places."""
    sizes = replace(Sizes(rows=5, dtype=dtype, device=DEVICE), **KEPT_IN[kept_in])
    make = cases.ARGUMENTS[name]
    static, second = make(sizes), make(replace(sizes, seed=7))
    outputs(name, copied(static))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = getattr(torch.ops.shadowkv, name)(*static.values())
    for key, value in second.items():
        if isinstance(value, Tensor):
            static[key].copy_(value)
    graph.replay()
    returned = [] if captured is None else [captured]
    returned = list(captured) if isinstance(captured, (tuple, list)) else returned
    found = [*returned, *(v for v in static.values() if isinstance(v, Tensor))]
    for a, b in zip(found, outputs(name, second), strict=True):
        assert same_bits(a, b), name


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(rows=24, heads=8, dim=128, chunks=3000, wanted=60, poison=False),
        Sizes(rows=24, heads=8, dim=128, chunks=3000, wanted=60, poison=False, fp8=True),
        Sizes(rows=5, chunks=700, wanted=60, landmarks=3, chunk_size=12),  # in two kernels
        Sizes(rows=3, chunks=0, wanted=0, poison=False),
    ],
    ids=["one kernel", "fp8", "two kernels", "none"],
)
def test_rows_are_done_before_the_selection_is(sizes: Sizes, captured: bool) -> None:
    """Work on another stream waits for some rows, and finds their ids; again and again."""
    arguments = cases.select_arguments(replace(sizes, device=DEVICE))
    expected = kernel("select_chunks", arguments)
    progress, rows = Progress(sizes.rows, torch.device(DEVICE)), range(sizes.rows)
    parts = [slice(rows[i], rows[i] + 2) for i in rows[::2]]
    streams = [torch.cuda.Stream() for _ in parts]
    ids = arguments | {"done": progress.done, "begun": progress.begun}

    def all_of_it() -> list[torch.Tensor]:
        found, here = ops.select_chunks(**ids), torch.cuda.current_stream()
        copies = []
        for part, stream in zip(parts, streams, strict=True):
            assert progress.begun is not None
            stream.wait_event(progress.begun)
            with torch.cuda.stream(stream):
                progress.wait(part, sizes.heads)
                copies.append(found[part].clone())
            here.wait_stream(stream)
        return [found, *copies]

    if captured:
        all_of_it()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = all_of_it()
        for _ in range(20):
            for tensor in found:
                tensor.fill_(-7)
            graph.replay()
    else:
        for _ in range(20):
            found = all_of_it()
    for tensor, wanted in zip(found, [expected, *(expected[part] for part in parts)], strict=True):
        assert torch.equal(tensor, wanted)
    assert not progress.done.any()


def test_a_graph_fetches_from_the_host() -> None:
    sizes = Sizes(rows=5, device=DEVICE)
    arguments = cases.fetch_arguments(sizes, pinned=True)
    theirs = copied(arguments)
    ops.fetch_values(**copied(arguments) | {"values": arguments["values"]})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fetch_values(**arguments)
    arguments["values"].neg_()
    theirs["values"].neg_()
    graph.replay()
    reference("fetch_values", theirs)
    assert same_bits(arguments["buffer"], theirs["buffer"])


@every_op
def test_opcheck(name: str) -> None:
    arguments = cases.ARGUMENTS[name](Sizes(device=DEVICE, poison=False))
    if "buffer" in arguments:
        arguments["buffer"].zero_()
    torch.library.opcheck(getattr(torch.ops.shadowkv, name).default, tuple(arguments.values()))


def test_what_is_not_compiled_runs_on_torch(capsys: pytest.CaptureFixture[str]) -> None:
    compiled._say_once.cache_clear()
    arguments = cases.full_arguments(Sizes(dim=80, poison=False, device=DEVICE))
    with pytest.raises(RuntimeError, match="head dimension 80"):
        kernel("full_attention", arguments)
    for _ in range(2):
        found = ops.full_attention(**arguments)
    assert same_bits(found, reference("full_attention", arguments))
    assert capsys.readouterr().err.count("head dimension of 80") == 1


def test_ops_of_any_size_are_never_left_to_torch(capsys: pytest.CaptureFixture[str]) -> None:
    compiled._say_once.cache_clear()
    for name in layer_cases.ANY_SIZE:
        getattr(ops, name)(**cases.ARGUMENTS[name](Sizes(dim=80, pairs=40, device=DEVICE)))
    assert capsys.readouterr().err == ""
    doubles = torch.ones(2, 4, dtype=torch.float64, device=DEVICE)
    assert ops.gated_silu(doubles, doubles).dtype == torch.float64
    assert "float64" in capsys.readouterr().err


def test_values_that_are_not_pinned_are_refused_by_the_kernel_alone() -> None:
    arguments = cases.fetch_arguments(Sizes(device=DEVICE))
    arguments["values"] = arguments["values"].cpu()
    with pytest.raises(RuntimeError, match="pinned"):
        kernel("fetch_values", arguments)
    theirs = copied(arguments)
    ops.fetch_values(**arguments)
    reference("fetch_values", theirs)
    assert same_bits(arguments["buffer"], theirs["buffer"])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("full_attention", {"lengths": lambda x: x[:2]}, "lengths must be"),
        ("full_attention", {"keys": lambda x: x.float()}, "keys must have the dtype"),
        ("sparse_attention", {"key_slots": lambda x: x.long()}, "key_slots must be int32"),
        ("select_chunks", {"excluded": lambda x: x[:, :, :5]}, "excluded must be"),
        ("select_chunks", {"done": lambda x: x[:2]}, "done must be"),
        ("await_rows", {"done": lambda x: x.long()}, "done must be int32"),
        ("update_residency", {"last_used": lambda x: x[..., :2].clone()}, "last_used must be"),
        ("rebuild_keys", {"basis": lambda x: x[:, :, :5]}, "basis must be"),
        ("fetch_values", {"scales": lambda x: torch.ones(1, device=DEVICE)}, "come together"),
        (
            "fetch_values",
            {name: lambda x: torch.ones(1, device=DEVICE) for name in ("scales", "buffer_scales")},
            "scales must be",
        ),
        ("sparse_attention", {"value_buffer": lambda x: torch.ones(1)}, "value_buffer must be"),
        ("sparse_attention", {"value_scales": lambda x: torch.ones(1)}, "value_scales belong to"),
        (
            "sparse_attention",
            {"value_buffer": lambda x: torch.ones(3, 2, 9, 8, 64, device=DEVICE).byte()},
            r"value_buffer must be \[3, 2, \*, 8, 112\]",
        ),
        (
            "sparse_attention",
            {name: lambda x: torch.ones(1) for name in ("value_buffer", "value_scales")},
            "value_buffer must be",
        ),
        ("fetch_values", {"misses": lambda x: x.long()}, "misses must be int32"),
        (
            "fetch_values",
            {"turns": lambda _: torch.zeros(3, dtype=torch.int32, device=DEVICE)},
            "turns must be",
        ),
        ("build_landmarks", {"per_chunk": lambda x: 3}, "do not divide"),
        ("rms_norm", {"weight": lambda x: x[1:]}, "weight must be"),
        ("rms_norm", {"x": lambda x: x.double(), "weight": lambda x: x.double()}, "dtype must be"),
        ("gated_silu", {"up": lambda x: x[:, :1]}, "up must be"),
        ("gated_silu", {"gate": lambda x: x.mT, "up": lambda x: x.mT}, "gate must be contiguous"),
        ("rotate_heads", {"key": lambda x: x.float()}, "key must have the dtype"),
        ("rotate_heads", {"cos": lambda x: x[:2]}, "cos must have 1 row or 3"),
        ("rotate_heads", {"sin": lambda x: x[..., 2:]}, "sin must be"),
        ("append_tokens", {"place": lambda x: x.long()}, "place must be int32"),
        ("append_tokens", {"values": lambda x: x[:, :1]}, "values must be"),
    ],
)
def test_refusals_name_the_tensor(name: str, change: dict[str, Any], words: str) -> None:
    arguments = cases.ARGUMENTS[name](Sizes(device=DEVICE))
    for key, alter in change.items():
        arguments[key] = alter(arguments.get(key))
    with pytest.raises(RuntimeError, match=words):
        kernel(name, arguments)
