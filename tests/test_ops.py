"""Each op against a plain reference: loops over rows and heads, in float32 or float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.ops import cases, layer_cases
from shadowkv_cli.ops.await_rows import SELECT_PARTS
from shadowkv_cli.ops.misses import list_misses, missing_places
from shadowkv_cli.ops.select_chunks import landmark_scores
from shadowkv_cli.ops.sizes import Sizes

INT32_MAX = torch.iinfo(torch.int32).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ids_of(generator: torch.Generator, counts: list[list[int]], chunks: int, width: int) -> Tensor:
    """Ascending unique ids [R, Hk, N] of the counts wanted, then -1."""
    out = torch.full((len(counts), len(counts[0]), width), -1, dtype=torch.int32)
    for r, row in enumerate(counts):
        for h, n in enumerate(row):
            out[r, h, :n] = torch.randperm(chunks, generator=generator)[:n].sort().values
    return out


def flags_of(misses: Tensor) -> Tensor:
    """bool [R, Hk, N], true at the places that a list of misses holds."""
    flags = torch.zeros(misses.shape, dtype=torch.bool)
    for r, h in torch.cartesian_prod(*map(torch.arange, misses.shape[:2])).tolist():
        flags[r, h, [i for i in misses[r, h].tolist() if i >= 0]] = True
    return flags


def assert_at_most_twice_as_wrong(ours: Tensor, plain: Tensor, exact: Tensor, case: object) -> None:
    """Both in low precision, held against float32; one ulp of the largest entry is forgiven."""
    floor = float(exact.abs().max()) * torch.finfo(ours.dtype).eps
    error, allowed = (float((x.float() - exact).abs().max()) for x in (ours, plain))
    assert error <= 2 * allowed + floor, (case, error, allowed)


# ---- build_landmarks ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "parts"), [(1, 1), (3, 1), (8, 1), (8, 2), (8, 4), (16, 4)])
@pytest.mark.parametrize("tokens", [2, 16, 77])
def test_build_landmarks(dtype: torch.dtype, size: int, parts: int, tokens: int) -> None:
    keys = torch.randn(3, tokens, 16, generator=generator_of(tokens)).to(dtype)
    landmarks, similarity = ops.build_landmarks(keys, size, parts)
    chunks = tokens // size
    assert landmarks.shape == (3, chunks, parts, 16)
    assert landmarks.dtype == dtype
    assert similarity.shape == (3, chunks)
    assert similarity.dtype == torch.float32
    part = size // parts
    for h in range(3):
        for c in range(chunks):
            members = keys[h, c * size : (c + 1) * size].double()
            for i in range(parts):
                mean = members[i * part : (i + 1) * part].mean(0)
                bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
                assert torch.allclose(landmarks[h, c, i].double(), mean, rtol=bound, atol=1e-6)
            mean = members.mean(0)
            cosine = members @ mean / (members.norm(dim=1) * mean.norm())
            assert abs(float(cosine.min() - similarity[h, c])) < 1e-5, (h, c)


def test_landmarks_leave_out_the_remainder() -> None:
    keys = torch.randn(1, 20, 16, generator=generator_of(0))
    poisoned = keys.clone()
    poisoned[:, 16:] = math.nan
    for a, b in zip(
        ops.build_landmarks(keys, 8, 2), ops.build_landmarks(poisoned, 8, 2), strict=True
    ):
        assert torch.equal(a, b)


# ---- select_chunks ----


def plain_scores(
    query: Tensor, landmarks: Tensor, barred: Tensor, scale: float
) -> list[list[float]]:
    """Log of the largest softmax in the group, per KV head and chunk; query [Hq, D], float64."""
    heads, chunks = barred.shape
    group = query.shape[0] // heads
    out = []
    for h in range(heads):
        free = [c for c in range(chunks) if not barred[h, c]]
        best = [-math.inf] * chunks
        for g in range(group):
            q = query[h * group + g].double()
            logits = [float((landmarks[h, c].double() @ q * scale).logsumexp(0)) for c in free]
            if free:
                norm = float(torch.tensor(logits, dtype=torch.float64).logsumexp(0))
                for c, x in zip(free, logits, strict=True):
                    best[c] = max(best[c], x - norm)
        out.append(best)
    return out


SELECT_CASES = [
    # heads, group, chunks, landmarks, dim
    (1, 1, 1, 1, 16),
    (2, 2, 33, 1, 16),
    (2, 3, 33, 2, 64),
    (1, 7, 20, 4, 16),
    (3, 1, 50, 1, 16),
    (1, 16, 12, 8, 32),
]


@pytest.mark.parametrize("case", SELECT_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prompts", [1, 3])
def test_select_chunks(case: tuple[int, ...], dtype: torch.dtype, prompts: int) -> None:
    """Unique, ascending, allowed, as many as exist, none below the k-th by more than eps."""
    heads, group, chunks, parts, dim = case
    g, rows = generator_of(sum(case)), 5
    query = torch.randn(rows, heads * group, dim, generator=g).to(dtype)
    landmarks = torch.randn(prompts, heads, chunks, parts, dim, generator=g).to(dtype)
    index = torch.randint(0, prompts, (rows,), generator=g, dtype=torch.int32)
    num = ints([chunks, max(1, chunks // 2), 1, max(1, chunks - 1), chunks])
    excluded = torch.rand(rows, heads, chunks, generator=g) < 0.2
    excluded[..., 0] = False
    budget = ints([min(3, chunks), chunks, 2, 0, 1])
    width, scale = int(budget.max()) + 2, dim**-0.5
    ids = ops.select_chunks(query, landmarks, None, index, num, excluded, budget, width, scale)
    assert ids.shape == (rows, heads, width)
    assert ids.dtype == torch.int32
    # Logits in low precision are rounded once: half an ulp of the largest, and the softmax norm's.
    top = float((query.float().norm(dim=-1).max() * landmarks.float().norm(dim=-1).max()) * scale)
    epsilon = 1e-5 if dtype == torch.float32 else 4 * top * torch.finfo(dtype).eps
    for r in range(rows):
        beyond = torch.arange(chunks) >= num[r]
        barred = excluded[r] | beyond
        scores = plain_scores(query[r], landmarks[index[r]], barred, scale)
        for h in range(heads):
            found = [c for c in ids[r, h].tolist() if c >= 0]
            where = (case, dtype, r, h)
            assert ids[r, h, len(found) :].tolist() == [-1] * (width - len(found)), where
            assert found == sorted(set(found)), where
            allowed = int((~barred[h]).sum())
            assert len(found) == min(int(budget[r]), allowed), where
            assert not any(bool(barred[h, c]) for c in found), where
            if found:
                kth = sorted(scores[h], reverse=True)[len(found) - 1]
                assert min(scores[h][c] for c in found) >= kth - epsilon, where


def select(query: Tensor, landmarks: Tensor, excluded: Tensor, budget: int, num: int) -> list:
    rows = query.shape[0]
    return ops.select_chunks(
        query,
        landmarks,
        None,
        torch.zeros(rows, dtype=torch.int32),
        ints([num] * rows),
        excluded,
        ints([budget] * rows),
        budget,
        0.25,
    ).tolist()


@pytest.mark.parametrize("num", [0, 6])
def test_select_chunks_where_none_may_be_chosen(num: int) -> None:
    """All chunks excluded, or a prompt of none: padding, whatever the budget."""
    query = torch.randn(1, 2, 16, generator=generator_of(0))
    landmarks = torch.randn(1, 1, 6, 1, 16, generator=generator_of(1))
    excluded = torch.full((1, 1, 6), num > 0)
    assert select(query, landmarks, excluded, 3, num) == [[[-1, -1, -1]]]


@pytest.mark.parametrize("chunks", [10, 100, 3000])
def test_select_chunks_gives_ties_to_the_lower_id(chunks: int) -> None:
    """Design, section 5: so the choice depends neither on the batch nor on the kernel."""
    query = torch.randn(2, 2, 16, generator=generator_of(0))
    landmarks = torch.ones(1, 1, chunks, 1, 16)
    excluded = torch.zeros(2, 1, chunks, dtype=torch.bool)
    assert select(query, landmarks, excluded, 4, chunks) == [[[0, 1, 2, 3]]] * 2


def test_select_chunks_tells_apart_what_softmax_would_underflow() -> None:
    query = torch.zeros(1, 1, 16)
    query[..., 0] = 400.0
    landmarks = torch.zeros(1, 1, 6, 1, 16)
    landmarks[0, 0, :, 0, 0] = torch.tensor([9.0, 1.0, 4.0, 2.0, 5.0, 3.0])
    excluded = torch.zeros(1, 1, 6, dtype=torch.bool)
    assert select(query, landmarks, excluded, 3, 6) == [[[0, 2, 4]]]


@pytest.mark.parametrize("per_chunk", [1, 2])
def test_prompts_of_as_many_rows_each_are_scored_as_each_row_alone(per_chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    landmarks = torch.randn(3, 2, 20, per_chunk, 16, generator=generator)
    query = torch.randn(6, 4, 16, generator=generator)
    first = torch.zeros(1, dtype=torch.int32)
    for order in ([0, 0, 1, 1, 2, 2], [2, 0, 1, 1, 0, 2], [0, 0, 0, 1, 1, 2]):
        prompts = torch.tensor(order, dtype=torch.int32)
        together = landmark_scores(query, landmarks, None, prompts, 0.25)
        for row, own in enumerate(order):
            alone = landmark_scores(query[row, None], landmarks[own, None], None, first, 0.25)
            torch.testing.assert_close(together[row, None], alone)


def test_rows_of_a_selection_are_counted_and_waited_for() -> None:
    arguments = cases.select_arguments(Sizes(device="cpu", rows=3, heads=2))
    done = arguments["done"]
    ids = ops.select_chunks(**arguments)
    assert done.tolist() == [2 * SELECT_PARTS] * 3
    assert torch.equal(ids, ops.select_chunks(**arguments | {"done": None}))
    ops.await_rows(done[1:], 2 * SELECT_PARTS)
    assert done.tolist() == [2 * SELECT_PARTS, 0, 0]
    with pytest.raises(ValueError, match="await_rows: done must be 16 at least"):
        ops.await_rows(done, 2 * SELECT_PARTS)
    with pytest.raises(ValueError, match="select_chunks: done must be"):
        ops.select_chunks(**arguments | {"done": done[1:]})
    with pytest.raises(ValueError, match="event of the CUDA runtime"):
        torch.ops.shadowkv.select_chunks(*(arguments | {"begun": 1}).values())


def test_select_chunks_ignores_what_lies_beyond() -> None:
    """Landmarks that were never written hold anything, NaN included."""
    query = torch.randn(1, 4, 16, generator=generator_of(0))
    landmarks = torch.randn(1, 2, 12, 2, 16, generator=generator_of(1))
    excluded = torch.zeros(1, 2, 12, dtype=torch.bool)
    excluded[..., 3] = True
    plain = select(query, landmarks, excluded, 5, 9)
    landmarks[:, :, 9:] = math.nan
    landmarks[:, :, 3] = math.inf
    assert select(query, landmarks, excluded, 5, 9) == plain


# ---- update_residency ----


@pytest.mark.parametrize("seed", range(6))
def test_update_residency_over_many_steps(seed: int) -> None:
    """Tables stay each other's inverse, hits keep their slot, the evicted are the oldest."""
    g = generator_of(seed)
    rows, heads, chunks, wanted = 3, 2, 30, 6
    slots_of = [6, 9, 17]  # rows may use fewer slots than the buffer holds
    buffer = max(slots_of)
    chunk_of_slot = torch.full((rows, heads, buffer), -1, dtype=torch.int32)
    last_used = torch.full((rows, heads, buffer), -1, dtype=torch.int32)
    for r, n in enumerate(slots_of):
        last_used[r, :, n:] = INT32_MAX
    slot_of_chunk = torch.full((rows, heads, chunks), -1, dtype=torch.int32)
    for step in range(1, 40):
        counts = torch.randint(0, wanted + 1, (rows, heads), generator=g).tolist()
        ids = ids_of(g, counts, chunks, wanted)
        before = [x.clone() for x in (chunk_of_slot, last_used, slot_of_chunk)]
        slots, listed, counts = ops.update_residency(
            ids, ints([step] * rows), chunk_of_slot, last_used, slot_of_chunk
        )
        assert counts.tolist() == (listed >= 0).sum(-1).tolist(), (seed, step)
        misses = flags_of(listed)
        for r in range(rows):
            for h in range(heads):
                where = (seed, step, r, h)
                old_chunks, old_used, old_slots = (x[r, h].tolist() for x in before)
                now_chunks, now_used = chunk_of_slot[r, h].tolist(), last_used[r, h].tolist()
                now_slots = slot_of_chunk[r, h].tolist()
                for i, c in enumerate(ids[r, h].tolist()):
                    slot, missing = int(slots[r, h, i]), bool(misses[r, h, i])
                    if c < 0:
                        assert (slot, missing) == (-1, False), where
                        continue
                    assert missing == (old_slots[c] < 0), where
                    assert missing or slot == old_slots[c], where
                    assert 0 <= slot < slots_of[r], where
                    assert now_chunks[slot] == c, where
                    assert now_used[slot] == step, where
                taken = [int(s) for s in slots[r, h] if s >= 0]
                assert len(set(taken)) == len(taken), where
                # The inverse of each other, and nothing beyond the row's slots is touched.
                for s, c in enumerate(now_chunks):
                    assert c < 0 or now_slots[c] == s, where
                for c, s in enumerate(now_slots):
                    assert s < 0 or now_chunks[s] == c, where
                assert now_used[slots_of[r] :] == [INT32_MAX] * (buffer - slots_of[r]), where
                assert now_chunks[slots_of[r] :] == [-1] * (buffer - slots_of[r]), where
                # Least recently used: no slot that was overwritten is newer than one that stayed.
                written = [s for s in range(slots_of[r]) if now_chunks[s] != old_chunks[s]]
                stayed = [
                    s for s in range(slots_of[r]) if now_used[s] == old_used[s] and s not in written
                ]
                if written and stayed:
                    newest = max(old_used[s] for s in written)
                    assert newest <= min(old_used[s] for s in stayed), where


def test_as_many_slots_as_chunks_keep_the_last_selection() -> None:
    """The paper's policy: a hit is what the step before selected, nothing else."""
    g, chunks, wanted = generator_of(3), 12, 5
    tables = [torch.full((1, 1, n), -1, dtype=torch.int32) for n in (wanted, wanted, chunks)]
    last: set[int] = set()
    for step in range(1, 30):
        ids = ids_of(g, [[wanted]], chunks, wanted)
        _, misses, counts = ops.update_residency(ids, ints([step]), *tables)
        now = ids[0, 0].tolist()
        new = [i for i, c in enumerate(now) if c not in last]
        assert misses[0, 0].tolist() == new + [-1] * (wanted - len(new)), step
        assert counts.tolist() == [[len(new)]], step
        last = set(now)


def test_misses_are_listed_in_order() -> None:
    flags = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 1, 1, 1]]]).bool()
    misses, counts = list_misses(flags)
    assert misses.tolist() == [[[0, 2, 3, -1], [-1] * 4], [[3, -1, -1, -1], [0, 1, 2, 3]]]
    assert counts.tolist() == [[3, 0], [1, 4]]
    assert misses.dtype == counts.dtype == torch.int32
    assert torch.equal(torch.stack(missing_places(misses), 1), flags.nonzero())


# ---- fetch_values ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_fetch_values_moves_every_bit(dtype: torch.dtype) -> None:
    g = generator_of(1)
    prompts, heads, chunks, size, dim, rows, wanted, buffer = 2, 3, 9, 5, 16, 4, 4, 6
    values = torch.randn(prompts, heads, chunks, size, dim, generator=g).to(dtype)
    counts = torch.randint(0, wanted + 1, (rows, heads), generator=g).tolist()
    ids = ids_of(g, counts, chunks, wanted)
    slots = ids_of(g, counts, buffer, wanted)
    misses = (torch.rand(ids.shape, generator=g) < 0.6) & (ids >= 0)
    index = ints([1, 0, 1, 1])
    space = torch.randn(rows, heads, buffer, size, dim, generator=g).to(dtype)
    expected = space.clone()
    for r, h, i in misses.nonzero().tolist():
        expected[r, h, slots[r, h, i]] = values[index[r], h, ids[r, h, i]]
    ops.fetch_values(values, None, index, ids, slots, *list_misses(misses), space)
    assert torch.equal(space.view(torch.uint8), expected.view(torch.uint8))


def test_fetch_values_into_the_slots_behind_a_fixed_part() -> None:
    """The buffer is a view of an address space: nothing before it changes."""
    g = generator_of(2)
    values = torch.randn(1, 1, 4, 2, 8, generator=g)
    space = torch.randn(1, 1, 5 + 3 * 2, 8, generator=g)
    fixed = space[:, :, :5].clone()
    buffer = space[:, :, 5:].unflatten(2, (-1, 2))
    ops.fetch_values(
        values,
        None,
        ints([0]),
        ints([[[1, 3]]]),
        ints([[[2, 0]]]),
        ints([[[0, 1]]]),
        ints([[2]]),
        buffer,
    )
    assert torch.equal(space[:, :, :5], fixed)
    assert torch.equal(space[0, 0, 9:11], values[0, 0, 1])
    assert torch.equal(space[0, 0, 5:7], values[0, 0, 3])


# ---- rebuild_keys ----


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One vector [D] by one entry a pair [E], as many pairs as the table has."""
    out, pairs = x.clone(), len(cos)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        out[a] = x[a] * cos[i] - x[b] * sin[i]
        out[b] = x[b] * cos[i] + x[a] * sin[i]
    return out


def rebuild_case(
    seed: int, prompts: int, pairs: int, dtype: torch.dtype
) -> dict[str, Tensor | bool]:
    g = generator_of(seed)
    heads, chunks, size, dim, rank, rows, wanted, buffer = 2, 6, 4, 16, 12, 3, 4, 5
    counts = torch.randint(0, wanted + 1, (rows, heads), generator=g).tolist()
    ids = ids_of(g, counts, chunks, wanted)
    angle = torch.rand(2, chunks * size + 3, pairs, generator=g) * 6
    misses, counted = list_misses((torch.rand(ids.shape, generator=g) < 0.7) & (ids >= 0))
    return {
        "coefficients": torch.randn(prompts, chunks * size, rank, generator=g).to(dtype),
        "basis": torch.randn(prompts, heads, rank, dim, generator=g).to(dtype),
        "prompt_index": torch.randint(0, prompts, (rows,), generator=g, dtype=torch.int32),
        "rank": ints([12, 1, 7]),
        "ids": ids,
        "slots": ids_of(g, counts, buffer, wanted),
        "misses": misses,
        "miss_counts": counted,
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "table_index": torch.randint(0, 2, (prompts,), generator=g, dtype=torch.int32),
        "interleaved": bool(seed % 2),
        "buffer": torch.full((rows, heads, buffer, size, dim), math.nan, dtype=dtype),
    }


def plain_rebuild(case: dict, dtype: torch.dtype) -> Tensor:
    """Key by key, in arithmetic of a dtype."""
    out = torch.full(case["buffer"].shape, math.nan, dtype=dtype)
    size = out.shape[3]
    for r, h, i in flags_of(case["misses"]).nonzero().tolist():
        p, n = int(case["prompt_index"][r]), int(case["rank"][r])
        table = int(case["table_index"][p])
        for t in range(size):
            token = int(case["ids"][r, h, i]) * size + t
            a = case["coefficients"][p, token, :n].to(dtype)
            key = a @ case["basis"][p, h, :n].to(dtype)
            cos, sin = (case[x][table, token].to(dtype) for x in ("cos", "sin"))
            turned = plain_rotate(key, cos, sin, case["interleaved"])
            out[r, h, int(case["slots"][r, h, i]), t] = turned
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("pairs", [8, 3])
def test_rebuild_keys(seed: int, prompts: int, pairs: int) -> None:
    """Ranks, tables and prompts of their own a row; slots that miss nothing keep their NaN."""
    case = rebuild_case(seed, prompts, pairs, torch.float32)
    expected = plain_rebuild(case, torch.float64)
    ops.rebuild_keys(**case)
    found = case["buffer"].double()
    assert torch.equal(found.isnan(), expected.isnan()), "only missing chunks are written"
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_rebuild_keys_in_low_precision(dtype: torch.dtype, seed: int) -> None:
    case = rebuild_case(seed, 2, 8, dtype)
    exact, plain = plain_rebuild(case, torch.float32), plain_rebuild(case, dtype)
    ops.rebuild_keys(**case)
    there = ~exact.isnan()
    assert_at_most_twice_as_wrong(case["buffer"][there], plain[there], exact[there], (seed, dtype))


def test_rebuild_keys_does_not_read_columns_above_the_rank() -> None:
    """What another row's larger rank left there may be anything."""
    case = rebuild_case(0, 1, 8, torch.float32)
    case["rank"] = ints([5, 5, 5])
    expected = plain_rebuild(case, torch.float64)
    case["coefficients"][..., 5:] = math.nan
    ops.rebuild_keys(**case)
    assert torch.allclose(case["buffer"].double(), expected, atol=1e-5, equal_nan=True)


# ---- attention ----


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query [D] over keys and values [T, D] in their dtype: output [D], log-sum-exp."""
    logits = keys @ q * scale
    return torch.softmax(logits, 0) @ values, logits.logsumexp(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "group", "dim"), [(1, 1, 16), (2, 3, 64), (1, 7, 96), (4, 4, 32)]
)
def test_full_attention(dtype: torch.dtype, heads: int, group: int, dim: int) -> None:
    """Per row its own prompt and length; what lies beyond the length is poison."""
    g, scale = generator_of(heads), 0.2
    keys = torch.randn(3, heads, 40, dim, generator=g).to(dtype)
    values = torch.randn(3, heads, 40, dim, generator=g).to(dtype)
    query = torch.randn(4, heads * group, dim, generator=g).to(dtype)
    index, lengths = [2, 0, 1, 0], [40, 17, 1, 17]
    for p, n in zip(index, lengths, strict=True):
        keys[p, :, n:], values[p, :, n:] = math.nan, math.nan
    found = ops.full_attention(query, keys, values, ints(index), ints(lengths), scale)
    assert found.dtype == dtype
    exact = torch.empty(query.shape)
    plain = torch.empty_like(query)
    for r, (p, n) in enumerate(zip(index, lengths, strict=True)):
        for j in range(heads * group):
            h = j // group
            args = query[r, j], keys[p, h, :n], values[p, h, :n]
            exact[r, j] = attention(*(x.float() for x in args), scale)[0]
            plain[r, j] = attention(*args, scale)[0]
    if dtype == torch.float32:
        assert torch.allclose(found, exact, rtol=1e-4, atol=1e-5)
    else:
        assert_at_most_twice_as_wrong(found, plain, exact, (heads, group, dim))


def sparse_case(
    seed: int, heads: int, group: int, dim: int, dtype: torch.dtype, size: int = 4
) -> dict:
    """An address space with unused places in every section, slots and slots of values apart."""
    g, rows, wanted = generator_of(seed), 4, 5
    capacities = [8, 7, 6]
    fixed, key_slots, value_slots = sum(capacities), 6, 9
    counts = [[n] * heads for n in (5, 3, 1, 0)]

    def shuffled(slots: int) -> Tensor:
        out = ids_of(g, counts, slots, wanted)
        for r in range(rows):
            for h in range(heads):
                n = counts[r][h]
                out[r, h, :n] = out[r, h, torch.randperm(n, generator=g)]
        return out

    return {
        "query": torch.randn(rows, heads * group, dim, generator=g).to(dtype),
        "keys": torch.randn(rows, heads, fixed + key_slots * size, dim, generator=g).to(dtype),
        "values": torch.randn(rows, heads, fixed + value_slots * size, dim, generator=g).to(dtype),
        "key_slots": shuffled(key_slots),
        "value_slots": shuffled(value_slots),
        "lengths": ints([[8, 7, 6], [0, 3, 1], [4, 0, 2], [1, 7, 6]]),
        "capacities": capacities,
        "chunk_size": size,
        "scale": dim**-0.5,
    }


def attended(case: dict, row: int, head: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Keys and values that a row's head attends, and their places in the address spaces."""
    places, start = [], 0
    for length, capacity in zip(case["lengths"][row].tolist(), case["capacities"], strict=True):
        places += range(start, start + length)
        start += capacity
    at = {"keys": list(places), "values": list(places)}
    for name, slots in (("keys", "key_slots"), ("values", "value_slots")):
        for slot in case[slots][row, head].tolist():
            if slot >= 0:
                first = start + slot * case["chunk_size"]
                at[name] += range(first, first + case["chunk_size"])
    return (
        case["keys"][row, head, at["keys"]],
        case["values"][row, head, at["values"]],
        at["keys"],
        at["values"],
    )


def plain_sparse(case: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, q_heads, dim = case["query"].shape
    heads = case["keys"].shape[1]
    out, lse = torch.empty(rows, q_heads, dim, dtype=dtype), torch.empty(rows, q_heads)
    for r in range(rows):
        for j in range(q_heads):
            keys, values, _, _ = attended(case, r, j * heads // q_heads)
            args = (x.to(dtype) for x in (case["query"][r, j], keys, values))
            out[r, j], lse[r, j] = attention(*args, case["scale"])
    return out, lse


SHAPES = [(1, 1, 16), (2, 3, 64), (1, 7, 128), (3, 2, 96)]


@pytest.mark.parametrize(("heads", "group", "dim"), SHAPES)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_sparse_attention(heads: int, group: int, dim: int, size: int) -> None:
    case = sparse_case(heads, heads, group, dim, torch.float32, size)
    expected, expected_lse = plain_sparse(case, torch.float64)
    out, lse = ops.sparse_attention(**case)
    assert torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert lse.dtype == torch.float32
    assert torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("heads", "group", "dim"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_sparse_attention_in_low_precision(
    dtype: torch.dtype, heads: int, group: int, dim: int, seed: int
) -> None:
    case = sparse_case(seed, heads, group, dim, dtype)
    exact, plain = plain_sparse(case, torch.float32)[0], plain_sparse(case, dtype)[0]
    found, _ = ops.sparse_attention(**case)
    assert found.dtype == dtype
    assert_at_most_twice_as_wrong(found, plain, exact, (heads, group, dim, seed))


@pytest.mark.parametrize("space", ["keys", "values"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_nothing_unselected_leaks_into_the_attention(space: str, poison: float) -> None:
    """A place out of use may hold what a failed sample left: NaN times a weight of 0 is NaN."""
    case = sparse_case(0, 2, 2, 16, torch.float32)
    expected = ops.sparse_attention(**case)
    case[space] = case[space].clone()
    for r in range(case["query"].shape[0]):
        for h in range(2):
            _, _, keys_at, values_at = attended(case, r, h)
            used = keys_at if space == "keys" else values_at
            unused = torch.ones(case[space].shape[2], dtype=torch.bool)
            unused[used] = False
            case[space][r, h, unused] = poison
    for found, before in zip(ops.sparse_attention(**case), expected, strict=True):
        assert torch.equal(found, before), (space, poison)


@pytest.mark.parametrize("capacity", [0, 3])
@pytest.mark.parametrize("chosen", [0, 2])
def test_attention_to_nothing_is_zero(capacity: int, chosen: int) -> None:
    """Beside a row that does attend, where there is room for that."""
    case = sparse_case(2, 2, 2, 16, torch.float32)
    case["capacities"] = [capacity, 0, 0]
    case["lengths"] = ints([[0, 0, 0], [capacity, 0, 0], [0, 0, 0]])
    for name in ("query", "keys", "values"):
        case[name] = case[name][:3]
    for name in ("key_slots", "value_slots"):
        case[name] = torch.full((3, 2, chosen), -1, dtype=torch.int32)
    out, lse = ops.sparse_attention(**case)
    attends = 1 if capacity else 3
    for row in range(3):
        assert bool(out[row].any()) == (row == attends)
        assert bool(lse[row].isfinite().all()) == (row == attends)
    assert bool(lse[0].isneginf().all())


def test_slots_change_no_bit_of_the_attention() -> None:
    """Chunks are visited in the order of their ids, wherever they lie."""
    case = sparse_case(1, 2, 2, 16, torch.float32)
    expected = ops.sparse_attention(**case)
    fixed, size, moved = sum(case["capacities"]), case["chunk_size"], dict(case)
    for name, slots in (("keys", "key_slots"), ("values", "value_slots")):
        buffer = case[name][:, :, fixed:].unflatten(2, (-1, size))
        count = buffer.shape[2]
        order = torch.randperm(count, generator=generator_of(5))
        larger = torch.zeros(*buffer.shape[:2], count + 3, *buffer.shape[3:])
        larger[:, :, order + 3] = buffer
        moved[name] = torch.cat((case[name][:, :, :fixed], larger.flatten(2, 3)), 2)
        old = case[slots].long()
        new = order[old.clamp_min(0)] + 3
        moved[slots] = new.masked_fill(old < 0, -1).to(torch.int32)
    for found, before in zip(ops.sparse_attention(**moved), expected, strict=True):
        assert torch.equal(found, before)


# ---- refusals ----


def refusals() -> dict[str, tuple]:
    """Op, arguments, and the words that the message must hold."""
    zeros, index = torch.zeros, ints([0])
    sparse = sparse_case(0, 2, 2, 16, torch.float32)
    rebuild = rebuild_case(0, 1, 8, torch.float32)
    ids = ints([[[0, 1]]])
    return {
        "landmarks: keys": (ops.build_landmarks, [zeros(1, 1, 8, 4), 4, 1], "keys"),
        "landmarks: parts": (ops.build_landmarks, [zeros(1, 8, 4), 8, 3], "landmarks"),
        "select: query heads": (
            ops.select_chunks,
            [
                zeros(1, 3, 4),
                zeros(1, 2, 5, 1, 4),
                None,
                index,
                index,
                zeros(1, 2, 5).bool(),
                index,
                1,
                1,
            ],
            "query heads",
        ),
        "select: excluded": (
            ops.select_chunks,
            [
                zeros(1, 2, 4),
                zeros(1, 2, 5, 1, 4),
                None,
                index,
                index,
                zeros(1, 2, 6).bool(),
                index,
                1,
                1,
            ],
            "excluded",
        ),
        "residency: slots": (
            ops.update_residency,
            [ids, index, ids[..., :1].clone(), ids[..., :1].clone(), ids.clone()],
            "chunk_of_slot",
        ),
        "values: chunk": (
            ops.fetch_values,
            [zeros(1, 1, 3, 4, 8), None, index, ids, ids, ids, ints([[2]]), zeros(1, 1, 3, 2, 8)],
            "values",
        ),
        "values: turns": (
            ops.fetch_values,
            [
                *[zeros(1, 1, 3, 2, 8), None, index, ids, ids, ids, ints([[2]])],
                *[zeros(1, 1, 3, 2, 8), None, ints([0, 0, 0])],
            ],
            "turns",
        ),
        "keys: basis": (
            ops.rebuild_keys,
            list((rebuild | {"basis": rebuild["basis"][:, :, :5]}).values()),
            "basis",
        ),
        "full: query heads": (
            ops.full_attention,
            [zeros(1, 3, 4), zeros(1, 2, 5, 4), zeros(1, 2, 5, 4), index, index, 1.0],
            "query heads",
        ),
        "sparse: lengths": (
            ops.sparse_attention,
            list((sparse | {"lengths": sparse["lengths"][:, :2]}).values()),
            "lengths",
        ),
        "sparse: query heads": (
            ops.sparse_attention,
            list((sparse | {"query": sparse["query"][:, :3]}).values()),
            "query heads",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals_name_the_tensor(name: str) -> None:
    op, arguments, words = refusals()[name]
    with pytest.raises(ValueError, match=words):
        op(*arguments)


# ---- opcheck ----


def op_arguments() -> dict[str, list]:
    g, sparse = generator_of(0), sparse_case(0, 2, 2, 16, torch.float32)
    rebuild = rebuild_case(0, 1, 8, torch.float32)
    rebuild["buffer"] = torch.zeros_like(rebuild["buffer"])
    query, keys = torch.randn(2, 4, 16, generator=g), torch.randn(1, 2, 12, 16, generator=g)
    ids = ids_of(g, [[3, 2], [1, 0]], 6, 3)
    table = torch.full((2, 2, 4), -1, dtype=torch.int32)
    small = Sizes(device="cpu", dim=8, pairs=3, chunks=2, poison=False)
    return {
        "build_landmarks": [keys[0], 4, 2],
        "select_chunks": [
            query,
            keys.unflatten(2, (6, 2)),
            None,
            ints([0, 0]),
            ints([6, 5]),
            torch.zeros(2, 2, 6).bool(),
            ints([2, 1]),
            2,
            0.25,
            torch.zeros(2, dtype=torch.int32),
            None,
        ],
        "update_residency": [
            ids,
            ints([1, 1]),
            table,
            table.clone(),
            torch.full((2, 2, 6), -1, dtype=torch.int32),
        ],
        "fetch_values": [
            keys.unflatten(2, (6, 2)),
            None,
            ints([0, 0]),
            ids,
            ids_of(g, [[3, 2], [1, 0]], 4, 3),
            *list_misses(ids >= 0),
            torch.zeros(2, 2, 4, 2, 16),
        ],
        "rebuild_keys": list(rebuild.values()),
        "full_attention": [query, keys, keys.clone(), ints([0, 0]), ints([12, 5]), 0.25],
        "sparse_attention": list(sparse.values()),
        "await_rows": [torch.full((3,), 16, dtype=torch.int32), 16],
        **{name: list(cases.ARGUMENTS[name](small).values()) for name in layer_cases.ANY_SIZE},
    }


@pytest.mark.parametrize("name", op_arguments())
def test_opcheck(name: str) -> None:
    """Schema, fake and dispatch as torch.library wants them."""
    op = getattr(torch.ops.shadowkv, name).default
    torch.library.opcheck(op, tuple(op_arguments()[name]))


def test_every_op_is_checked() -> None:
    assert set(op_arguments()) == set(ops.__all__)
