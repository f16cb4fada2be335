"""The methods as groups: the controls, the audit, the buffers, and the low-rank form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import SPECS, MethodSpec, ModelShape, spec_fields
from shadowkv_cli.methods import Group, Prompt, PromptStore, RotaryTables, Row, build_groups
from shadowkv_cli.methods.low_rank import factorise

SPARSE = ("shadowkv", "oracle", "random", "streaming")
ALL = ("full", *SPARSE)
DIM = 16


def spec_of(name: str, **fields: object) -> MethodSpec:
    """A method with a small budget and, of the fields given, those that it has."""
    settings = {"sparse_budget": "32", "dense_fallback": "never", "rank": "8"} | fields
    own = {k: str(v) for k, v in settings.items() if k in spec_fields(SPECS[name])}
    [spec] = build_specs([name], own)
    return spec


class Bench:
    """Groups of rows on random prompts of one or two layers, with no rotation."""

    def __init__(
        self,
        specs: Sequence[MethodSpec],
        lengths: Sequence[int],
        *,
        steps: int = 8,
        heads: int = 2,
        group: int = 2,
        layers: int = 1,
        seed: int = 0,
        prompt_keys: Sequence[str] | None = None,
        store_tokens: int | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.shape = ModelShape(layers, heads * group, heads, DIM, 4)
        self.specs, self.lengths, self.scale = list(specs), list(lengths), DIM**-0.5
        self.store = PromptStore(
            self.shape,
            specs,
            num_prompts=len(lengths),
            prompt_tokens=store_tokens or max(lengths),
            new_tokens=steps,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        total = self.store.prompt_tokens + steps
        index = torch.zeros(len(lengths), dtype=torch.int32)
        table = torch.ones(1, total, DIM)
        self.store.tables = RotaryTables(table, torch.zeros_like(table), index, False)
        self.rows = [Row(spec, p) for p in range(len(lengths)) for spec in specs]
        self.groups = build_groups(self.rows, self.store, steps)
        self.keys = [
            [torch.randn(heads, n, DIM, generator=g) * 2 for n in lengths] for _ in range(layers)
        ]
        self.values = [
            [torch.randn(heads, n, DIM, generator=g) for n in lengths] for _ in range(layers)
        ]
        count = len(self.rows)
        # A row decodes what its prompt's other rows decode: methods are compared on equal queries.
        per_prompt = len(specs)
        drawn = [
            [
                torch.randn(steps, len(lengths), n, DIM, generator=g).repeat_interleave(
                    per_prompt, 1
                )
                for n in (heads * group, heads, heads)
            ]
            for _ in range(layers)
        ]
        self.new = drawn
        self.selected: list[list[Tensor]] = [[] for _ in range(count)]
        for p, n in enumerate(lengths):
            prompt = Prompt(p, n, (prompt_keys or [str(i) for i in range(len(lengths))])[p])
            for _, member in self.groups:
                member.begin(prompt)
            for layer in range(layers):
                k, v = self.keys[layer][p], self.values[layer][p]
                self.store.add_layer(layer, prompt, k, v)
                for _, member in self.groups:
                    member.prefill_layer(layer, prompt, torch.zeros(heads * group, n, DIM), k, v)
        for places, member in self.groups:
            if hasattr(member, "select"):
                self.spy(places, member)

    def spy(self, places: list[int], group: Group) -> None:
        select = group.select

        def spied(layer: int, q: Tensor, scale: float) -> Tensor:
            ids = select(layer, q, scale)
            for i, place in enumerate(places):
                self.selected[place].append(ids[i].clone())
            return ids

        group.select = spied

    def step(self, i: int) -> Tensor:
        """Decode step i (from 0): outputs of layer 0, [R, Hq, D]."""
        out = torch.empty(len(self.rows), self.shape.num_q_heads, DIM)
        for places, group in self.groups:
            group.make_room(1)
            group.advance()
            for layer, (q, k, v) in enumerate(self.new):
                group.append(layer, k[i, places][:, :, None], v[i, places][:, :, None])
                found = group.attend(layer, q[i, places][:, :, None], self.scale)[:, :, 0]
                if layer == 0:
                    out[places] = found
            group.finish()
        return out

    def run(self, steps: int) -> list[Tensor]:
        return [self.step(i) for i in range(steps)]

    def audit(self, row: int, generated: int) -> dict:
        for places, group in self.groups:
            if row in places:
                return group.audit(places.index(row), generated)
        raise AssertionError(row)

    def exact(self, row: int, step: int, tokens: list[list[int]]) -> Tensor:
        """Attention of layer 0 over those prompt tokens per KV head and all generated ones."""
        p = self.rows[row].prompt_index
        q, k, v = (x[:, row].double() for x in self.new[0])
        out, group = [], self.shape.num_q_heads // self.shape.num_kv_heads
        for j in range(self.shape.num_q_heads):
            h = j // group
            keys = torch.cat((self.keys[0][p][h, tokens[h]].double(), k[: step + 1, h]))
            values = torch.cat((self.values[0][p][h, tokens[h]].double(), v[: step + 1, h]))
            out.append(torch.softmax(keys @ q[step, j] * self.scale, 0) @ values)
        return torch.stack(out)


def chunks_of(ids: Tensor) -> list[list[int]]:
    return [[c for c in head if c >= 0] for head in ids.tolist()]


def tokens_of(chunks: list[int], size: int) -> list[int]:
    return [t for c in chunks for t in range(c * size, (c + 1) * size)]


# ---- full attention ----


def test_full_attends_everything() -> None:
    bench = Bench([spec_of("full"), spec_of("shadowkv")], [77, 50])
    for i, out in enumerate(bench.run(8)):
        for row, length in ((0, 77), (2, 50)):
            expected = bench.exact(row, i, [list(range(length))] * 2)
            assert torch.allclose(out[row].double(), expected, atol=1e-5), (i, row)


# ---- the controls ----


@pytest.mark.parametrize("name", ["oracle", "random"])
@pytest.mark.parametrize("local", [0, 4])
@pytest.mark.parametrize("size", [3, 8])
def test_controls_attend_what_they_select_exactly(name: str, local: int, size: int) -> None:
    spec = spec_of(name, chunk_size=size, local_chunks=local, sparse_budget=6 * size)
    bench = Bench([spec], [157, 101])
    for i, out in enumerate(bench.run(6)):
        for row, length in enumerate((157, 101)):
            free = max(0, length // size - local)
            chosen = chunks_of(bench.selected[row][i])
            assert all(c < free for head in chosen for c in head), (name, row)
            local_tokens = list(range(free * size, length))
            tokens = [tokens_of(head, size) + local_tokens for head in chosen]
            expected = bench.exact(row, i, tokens)
            assert torch.allclose(out[row].double(), expected, atol=1e-5), (i, row)


def true_mass(bench: Bench, row: int, step: int, size: int, free: int) -> Tensor:
    """Share of full attention that each free chunk draws, [Hk, G, C], in float64."""
    p, heads = bench.rows[row].prompt_index, bench.shape.num_kv_heads
    group = bench.shape.num_q_heads // heads
    q, k, _ = (x[:, row].double() for x in bench.new[0])
    mass = torch.zeros(heads, group, free, dtype=torch.float64)
    for h in range(heads):
        keys = torch.cat((bench.keys[0][p][h].double(), k[: step + 1, h]))
        for g in range(group):
            weights = torch.softmax(keys @ q[step, h * group + g] * bench.scale, 0)
            for c in range(free):
                mass[h, g, c] = weights[c * size : (c + 1) * size].sum()
    return mass


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_oracle_selects_the_most_true_attention(group: int, seed: int) -> None:
    """By brute force: the largest share of full attention that a query head of the group gives."""
    size, length = 4, 131
    spec = spec_of("oracle", chunk_size=size, sparse_budget=size * 8)
    bench = Bench([spec], [length], heads=3, group=group, seed=seed)
    bench.run(4)
    free = length // size - 4
    assert bench.audit(0, 4)["selected"] == (8 + 2) * size, "8 and 1.5 outliers, rounded"
    wanted = 8 + 2
    for i in range(4):
        best = true_mass(bench, 0, i, size, free).amax(1)
        for h, chosen in enumerate(chunks_of(bench.selected[0][i])):
            expected = best[h].topk(wanted).indices.tolist()
            assert set(chosen) == set(expected), (group, seed, i, h)


def draws(spec: MethodSpec, lengths: Sequence[int], **options) -> list[list[list[list[int]]]]:
    """Chunks by row, call and KV head."""
    bench = Bench([spec], lengths, layers=2, **options)
    bench.run(4)
    return [[chunks_of(ids) for ids in row] for row in bench.selected]


def test_random_is_the_same_for_the_same_prompt_alone_and_in_a_batch() -> None:
    spec = spec_of("random")
    a, b = draws(spec, [200, 163], prompt_keys=["x", "y"])
    assert draws(spec, [200], prompt_keys=["x"]) == [a]
    assert draws(spec, [163], prompt_keys=["y"], store_tokens=400) == [b]
    assert draws(spec, [163, 200], prompt_keys=["y", "x"], seed=5) == [b, a], "whatever the keys"


def test_random_differs_by_everything_that_should_tell_draws_apart() -> None:
    spec = spec_of("random")
    [a] = draws(spec, [200], prompt_keys=["x"])
    assert len({str(call) for call in a}) == len(a), "steps and layers"
    assert all(call[0] != call[1] for call in a), "heads"
    for other in (
        draws(spec, [200], prompt_keys=["y"]),
        draws(spec_of("random", seed=43), [200], prompt_keys=["x"]),
    ):
        assert all(x != y for x, y in zip(a, other[0], strict=True))


def test_random_draws_again_after_a_reset() -> None:
    bench = Bench([spec_of("random")], [200])
    bench.run(4)
    bench.groups[0][1].reset()
    bench.run(4)
    first, again = bench.selected[0][:4], bench.selected[0][4:]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_random_is_uniform() -> None:
    """Every free chunk as often as any other: chi-square below its 99.99 % quantile."""
    counts, drawn = torch.zeros(21), 0
    for seed in range(12):
        [calls] = draws(spec_of("random", seed=seed), [200], steps=4)
        for call in calls:
            for head in call:
                counts[head] += 1
                drawn += len(head)
    assert drawn == 12 * 8 * 2 * 5
    expected = drawn / 21
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 55, counts  # 20 degrees of freedom


@pytest.mark.parametrize("sinks", [0, 4, 13, 10_000])
@pytest.mark.parametrize("lengths", [(157, 157), (157, 143), (160, 101)], ids=str)
def test_streaming_attends_sinks_and_recent_tokens(sinks: int, lengths: tuple[int, int]) -> None:
    bench = Bench([spec_of("streaming", sink_tokens=sinks)], lengths)
    outputs = bench.run(8)
    for row, length in enumerate(lengths):
        total = 32 + 8 + 32 + length % 8  # budget, one outlier chunk, four local, the remainder
        audit = bench.audit(row, 8)
        assert audit["attended_tokens"] == total + 8, (row, audit)
        first = min(sinks, total)
        tokens = [*range(first), *range(length - (total - first), length)]
        for i, out in enumerate(outputs):
            expected = bench.exact(row, i, [tokens] * 2)
            assert torch.allclose(out[row].double(), expected, atol=1e-5), (sinks, lengths, row, i)


# ---- the audit ----


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tokens that the attention op really reads, per call: [R, Hk]."""
    seen: list[Tensor] = []
    plain = ops.sparse_attention

    def spied(q, keys, values, key_slots, value_slots, lengths, capacities, size, *more):
        fixed = torch.minimum(lengths, torch.tensor(capacities)).sum(1)
        assert torch.equal(key_slots >= 0, value_slots >= 0)
        seen.append(fixed[:, None] + (key_slots >= 0).sum(-1) * size)
        return plain(q, keys, values, key_slots, value_slots, lengths, capacities, size, *more)

    monkeypatch.setattr(ops, "sparse_attention", spied)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunk_size": 3, "sparse_budget": 30},
        {"local_chunks": 0, "outlier_chunks": 0},
        {"outlier_chunks": 7, "sparse_budget": "10%"},
        {"sparse_budget": 4096},
        {"sparse_budget": "100%", "local_chunks": 1},
    ],
    ids=str,
)
def test_every_method_attends_as_many_tokens(
    settings: dict[str, object], attended: list[Tensor]
) -> None:
    """As ShadowKV with the same settings; the audit says what the op was given."""
    lengths = [203, 90, 33]
    counts: dict[str, list[int]] = {}
    for name in SPARSE:
        bench = Bench([spec_of(name, **settings)], lengths, steps=3)
        attended.clear()
        bench.run(3)
        counts[name] = []
        for row in range(len(lengths)):
            audit = bench.audit(row, 3)
            parts = [audit[k] for k in ("selected", "outlier", "local", "generated")]
            assert audit["attended_tokens"] == sum(parts), (name, audit)
            assert audit["generated"] == 3
            assert attended[-1][row].tolist() == [sum(parts)] * 2, (name, settings, row)
            assert sum(parts[:3]) <= lengths[row]
            counts[name].append(audit["attended_tokens"])
    assert all(found == counts["shadowkv"] for found in counts.values()), counts


def test_audit_of_full_attention() -> None:
    bench = Bench([spec_of("full")], [61])
    bench.run(5)
    audit = bench.audit(0, 5)
    assert audit["attended_tokens"] == 66
    assert audit["hit_rate"] is None
    assert sum(audit[k] for k in ("selected", "outlier", "local", "generated")) == 66


# ---- hit rate and buffers ----


def overlap(calls: list[Tensor]) -> float:
    """Share of each selection, the first left out, that the one before it held too."""
    hits = total = 0
    for before, now in itertools.pairwise(calls):
        for a, b in zip(chunks_of(before), chunks_of(now), strict=True):
            hits += len(set(a) & set(b))
            total += len(b)
    return hits / total


@pytest.mark.parametrize("name", ["shadowkv", "oracle", "random"])
def test_hit_rate_is_the_overlap_of_consecutive_selections(name: str) -> None:
    bench = Bench([spec_of(name), spec_of(name, sparse_budget=48)], [203, 120], steps=12)
    bench.run(12)
    for row, calls in enumerate(bench.selected):
        rate = bench.audit(row, 12)["hit_rate"]
        assert rate == pytest.approx(overlap(calls)), (name, row)


def test_hit_rate_of_a_larger_buffer() -> None:
    """Chunks of the last selections, newest first, as many as there are slots."""
    bench = Bench([spec_of("shadowkv", value_buffer=2.0)], [203], steps=20)
    bench.run(20)
    hits = total = 0
    held: list[dict[int, int]] = [{}, {}]
    for step, ids in enumerate(bench.selected[0]):
        for head, chosen in enumerate(chunks_of(ids)):
            if step:
                hits += sum(c in held[head] for c in chosen)
                total += len(chosen)
            held[head].update(dict.fromkeys(chosen, step))
            # Of equally old chunks any may go; with the budget dividing the buffer few are.
            newest = sorted(held[head], key=lambda c: -held[head][c])
            held[head] = {c: held[head][c] for c in newest[:8]}
    assert bench.audit(0, 20)["hit_rate"] == pytest.approx(hits / total, abs=0.1)
    assert bench.audit(0, 20)["hit_rate"] > overlap(bench.selected[0])


def test_hit_rate_is_of_the_rows_own_answer() -> None:
    """Rows that have ended decode on with the batch: their record must not depend on it."""
    bench = Bench([spec_of("shadowkv")], [203], steps=12)
    bench.run(4)
    alone = bench.audit(0, 4)
    for i in range(4, 12):
        bench.step(i)
    assert bench.audit(0, 4) == alone


@pytest.mark.parametrize("name", SPARSE)
def test_reset_forgets_a_step_that_was_not_finite(name: str) -> None:
    """A failing sample (float16 overflow) must not spoil the next one in the same buffers."""
    bench = Bench([spec_of(name)], [203])
    clean = bench.run(2)
    [(_, group)] = bench.groups
    group.reset()
    group.make_room(1)
    group.advance()
    group.append(0, torch.full((1, 2, 1, DIM), math.nan), torch.full((1, 2, 1, DIM), math.inf))
    group.attend(0, torch.full((1, 4, 1, DIM), math.nan), bench.scale)
    group.make_room(1)
    group.advance()
    group.append(0, torch.full((1, 2, 1, DIM), math.nan), torch.full((1, 2, 1, DIM), math.inf))
    group.reset()
    for before, now in zip(clean, bench.run(2), strict=True):
        assert torch.equal(before, now), name


# ---- capacity ----


@pytest.mark.parametrize("name", ALL)
def test_more_tokens_than_there_is_room_for(name: str) -> None:
    """The official code drops such writes without a word."""
    bench = Bench([spec_of(name)], [90], steps=3)
    bench.run(3)
    with pytest.raises(AssertionError, match="3"):
        bench.groups[0][1].make_room(1)


@pytest.mark.parametrize("name", ALL)
def test_a_longer_prompt_than_the_store_has_room_for(name: str) -> None:
    """Said at once, not by attending other tokens."""
    bench = Bench([spec_of(name)], [80], steps=8)
    longer = Prompt(0, 85, "x")
    k, v = torch.randn(2, 2, 85, DIM)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):  # noqa: PT012
        bench.groups[0][1].begin(longer)
        bench.store.add_layer(0, longer, k, v)
        bench.groups[0][1].prefill_layer(0, longer, torch.zeros(4, 85, DIM), k, v)


def test_values_have_no_room_for_tokens_that_nobody_puts_there() -> None:
    """Only full attention appends to the store; ShadowKV's bytes are what it is judged by."""
    bench = Bench([spec_of("shadowkv")], [80], steps=64)
    assert bench.store.values[0].shape[2] == 80


# ---- the low-rank form ----


def matrix(tokens: int, width: int, decay: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    return torch.randn(tokens, width, generator=g) * decay ** torch.arange(width) @ turn


@pytest.mark.parametrize("rank", [1, 3, 16, 40, 64])
@pytest.mark.parametrize("decay", [1.0, 0.9, 0.8])
@pytest.mark.parametrize("tokens", [40, 700])
def test_factorise_is_as_good_as_the_svd(rank: int, decay: float, tokens: int) -> None:
    keys = matrix(tokens, 64, decay, rank)
    a, b = factorise(keys, rank)
    assert a.shape == (tokens, rank)
    assert b.shape == (rank, 64)
    singular = torch.linalg.svdvals(keys.double())
    best = singular[rank:].norm()
    error = (a.double() @ b.double() - keys.double()).norm()
    # A Gram matrix in float32 tells singular values apart down to the root of its precision.
    floor = torch.finfo(torch.float32).eps ** 0.5 * keys.norm()
    assert error <= best * (1 + 1e-4) + floor, (rank, decay, float(error), float(best))
    assert torch.allclose(b @ b.T, torch.eye(rank), atol=1e-5), "an orthonormal basis"


def test_factorise_is_nested() -> None:
    keys = matrix(300, 48, 0.9, 0)
    a, b = factorise(keys, 48)
    for rank in (1, 7, 20):
        smaller_a, smaller_b = factorise(keys, rank)
        assert torch.equal(smaller_b, b[:rank]), rank
        assert torch.allclose(smaller_a, a[:, :rank], atol=1e-5), rank
        best = torch.linalg.svdvals(keys.double())[rank:].norm()
        error = (a[:, :rank].double() @ b[:rank].double() - keys.double()).norm()
        assert error <= best * (1 + 1e-4), rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_rank_reproduces_the_keys(dtype: torch.dtype) -> None:
    keys = matrix(200, 64, 0.95, 2).to(dtype)
    a, b = factorise(keys, 64)
    assert torch.allclose(a @ b, keys.float(), atol=2e-5)


def test_factorise_of_fewer_tokens_than_columns() -> None:
    keys = matrix(5, 64, 1.0, 3)
    a, b = factorise(keys, 64)
    assert torch.allclose(a @ b, keys, atol=2e-5)
