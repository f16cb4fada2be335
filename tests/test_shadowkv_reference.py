"""ShadowKV against a plain implementation from the paper: float64, loops, its own RoPE and SVD."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shadowkv_cli.config import ModelShape, ShadowKVSpec, SparseBudget
from shadowkv_cli.methods import Prompt, PromptStore, RotaryTables, Row
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.model.loading import LoadedModel
from shadowkv_cli.model.session import Session
from shadowkv_cli.testing import tiny_model

NEAR_TIE = 1e-5
"""Chunks whose log-scores differ by less may be chosen one for the other in float32."""


# ---- the reference: nothing below this line and above the next uses the code under test ----


@dataclass(frozen=True)
class Rope:
    """Angles of a token per pair of dimensions, the pairing, and the factor of longrope."""

    frequencies: tuple[float, ...]
    interleaved: bool = False
    factor: float = 1.0

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotate one vector [D] in float64."""
        out, pairs = x.double().clone(), len(self.frequencies)
        for i, frequency in enumerate(self.frequencies):
            a, b = (2 * i, 2 * i + 1) if self.interleaved else (i, i + pairs)
            cos = math.cos(position * frequency) * self.factor
            sin = math.sin(position * frequency) * self.factor
            out[a] = cos * float(x[a]) - sin * float(x[b])
            out[b] = sin * float(x[a]) + cos * float(x[b])
        return out

    def turn_all(self, x: Tensor, positions: range | list[int]) -> Tensor:
        """Rotate [..., S, D] by position, in float64; `turn` for many tokens at once."""
        x, pairs = x.double(), len(self.frequencies)
        angle = torch.outer(
            torch.tensor(list(positions), dtype=torch.float64),
            torch.tensor(self.frequencies, dtype=torch.float64),
        )
        cos, sin = angle.cos() * self.factor, angle.sin() * self.factor
        out = x.clone()
        for i in range(pairs):
            a, b = (2 * i, 2 * i + 1) if self.interleaved else (i, i + pairs)
            out[..., a] = cos[:, i] * x[..., a] - sin[:, i] * x[..., b]
            out[..., b] = sin[:, i] * x[..., a] + cos[:, i] * x[..., b]
        return out


@dataclass(frozen=True)
class Setting:
    """The paper's hyper-parameters, in chunks."""

    rank: int = 7
    chunk_size: int = 8
    budget_chunks: int = 4
    outlier_chunks: int = 2
    local_chunks: int = 4
    landmarks: int = 1


def landmarks_of(keys: Tensor, chunks: int, setting: Setting) -> Tensor:
    """Means of each chunk's parts [C, L, D]; keys [S, D] after RoPE."""
    means, size = [], setting.chunk_size // setting.landmarks
    for c in range(chunks):
        start = c * setting.chunk_size
        parts = [start + i * size for i in range(setting.landmarks)]
        means.append(torch.stack([keys[i : i + size].mean(0) for i in parts]))
    return torch.stack(means) if means else torch.empty(0)


def outliers_of(keys: Tensor, chunks: int, setting: Setting) -> list[int]:
    """The chunks with a key least like their landmark; keys [S, D] after RoPE."""
    worst = []
    for c in range(chunks):
        members = keys[c * setting.chunk_size : (c + 1) * setting.chunk_size]
        mean = members.mean(0)
        worst.append(float((members @ mean / (members.norm(dim=1) * mean.norm())).min()))
    return sorted(range(chunks), key=lambda c: worst[c])[: setting.outlier_chunks]


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    norm = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - norm for x in logits]


class PaperLayer:
    """One layer of ShadowKV after its prefill."""

    def __init__(self, pre: Tensor, values: Tensor, rope: Rope, setting: Setting) -> None:
        """pre, values [Hk, S, D]: keys before RoPE, and values."""
        self.setting, self.rope, self.values = setting, rope, values.double()
        heads, tokens, dim = pre.shape
        self.keys = rope.turn_all(pre, range(tokens))
        joint = pre.double().transpose(0, 1).reshape(tokens, heads * dim)  # [S, Hk*D]
        u, s, vt = torch.linalg.svd(joint, full_matrices=False)
        r = min(setting.rank, len(s))
        low = (u[:, :r] * s[:r]) @ vt[:r]
        low = low.reshape(tokens, heads, dim).transpose(0, 1)
        self.rebuilt = rope.turn_all(low, range(tokens))
        self.chunks = max(0, tokens // setting.chunk_size - setting.local_chunks)
        self.local_start = self.chunks * setting.chunk_size
        self.outliers = [outliers_of(k, self.chunks, setting) for k in self.keys]
        self.landmarks = [landmarks_of(k, self.chunks, setting) for k in self.keys]

    def members(self, chunk: int) -> range:
        c = self.setting.chunk_size
        return range(chunk * c, (chunk + 1) * c)

    def scores(self, head: int, queries: Tensor, scale: float) -> dict[int, float]:
        """Log of the group's largest softmax, per chunk that is neither outlier nor local."""
        free = [c for c in range(self.chunks) if c not in self.outliers[head]]
        if not free:
            return {}
        per_query = []
        for q in queries:
            parts = self.landmarks[head][free] @ q * scale  # [free, L]
            per_query.append(log_softmax(parts.exp().sum(1).log().tolist()))
        return {c: max(p[i] for p in per_query) for i, c in enumerate(free)}

    def select(self, head: int, queries: Tensor, scale: float) -> set[int]:
        scores = self.scores(head, queries, scale)
        best = sorted(scores, key=lambda c: -scores[c])
        return set(best[: self.setting.budget_chunks])

    def attend(
        self, queries: Tensor, gen_k: Tensor, gen_v: Tensor, scale: float, chosen: list[set[int]]
    ) -> Tensor:
        """queries [Hq, D], gen_k and gen_v [Hk, T, D] after RoPE, chosen per KV head: [Hq, D]."""
        heads = len(self.keys)
        group = len(queries) // heads
        out = torch.empty(queries.shape, dtype=torch.float64)
        for h in range(heads):
            exact = [t for c in self.outliers[h] for t in self.members(c)]
            exact += range(self.local_start, self.values.shape[1])
            fetched = [t for c in chosen[h] for t in self.members(c)]
            keys = torch.cat((self.keys[h][exact], self.rebuilt[h][fetched], gen_k[h].double()))
            values = torch.cat((self.values[h][exact + fetched], gen_v[h].double()))
            for g in range(group):
                weights = torch.softmax(keys @ queries[h * group + g].double() * scale, 0)
                out[h * group + g] = weights @ values
        return out


# ---- the two held against each other ----


def agree_on_selection(
    paper: PaperLayer, queries: Tensor, scale: float, found: list[set[int]], case: object
) -> None:
    """The same chunks per KV head, but for chunks whose scores are nearly equal."""
    group = len(queries) // len(paper.keys)
    for h, ours in enumerate(found):
        of_head = queries[h * group : (h + 1) * group].double()
        expected = paper.select(h, of_head, scale)
        assert len(ours) == len(expected), (case, h, ours, expected)
        assert not ours & set(paper.outliers[h]), (case, h, "an outlier was selected")
        if ours != expected:
            scores = paper.scores(h, of_head, scale)
            cut = min(scores[c] for c in expected)
            near = all(abs(scores[c] - cut) < NEAR_TIE for c in ours ^ expected)
            assert near, (case, h, ours, expected)


def assert_close(found: Tensor, expected: Tensor, case: object, relative: float = 1e-4) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < relative, (case, float(error))


def spied_selection(group) -> list[Tensor]:
    """The chunk ids that a group selects from now on, [R, Hk, N] a call."""
    seen: list[Tensor] = []
    select = group.select

    def spy(layer: int, q: Tensor, scale: float) -> Tensor:
        ids = select(layer, q, scale)
        seen.append(ids.clone())
        return ids

    group.select = spy
    return seen


def as_sets(ids: Tensor) -> list[set[int]]:
    sets = []
    for head in ids.tolist():
        kept = [c for c in head if c >= 0]
        assert len(set(kept)) == len(kept), head
        sets.append(set(kept))
    return sets


def spec_of(setting: Setting, **fields) -> ShadowKVSpec:
    budget = SparseBudget(tokens=setting.budget_chunks * setting.chunk_size)
    return ShadowKVSpec(
        sparse_budget=budget,
        rank=setting.rank,
        chunk_size=setting.chunk_size,
        outlier_chunks=setting.outlier_chunks,
        local_chunks=setting.local_chunks,
        landmarks_per_chunk=setting.landmarks,
        dense_fallback="never",
        **fields,
    )


def default_rope(dim: int, **fields) -> Rope:
    return Rope(tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2)), **fields)


@dataclass(frozen=True)
class Case:
    """A synthetic layer: sizes, rotation and settings."""

    setting: Setting = Setting()
    tokens: int = 149
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    rope: Rope | None = None
    seed: int = 0
    steps: int = 3
    spec: tuple[tuple[str, object], ...] = ()


def keys_of(generator: torch.Generator, heads: int, tokens: int, dim: int) -> Tensor:
    """Keys [Hk, S, D] with a shared offset, a decaying spectrum and some that stand alone."""
    width = heads * dim
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    decay = 4 * 0.9 ** torch.arange(width)
    keys = torch.randn(tokens, width, generator=generator) * decay @ basis.T
    keys = keys + 0.3 * torch.randn(width, generator=generator)
    alone = torch.rand(tokens, generator=generator) < 0.05
    keys[alone] *= 3
    return keys.reshape(tokens, heads, dim).transpose(0, 1).contiguous()


def run_group(
    layers: list[tuple[Tensor, Tensor]],
    ropes: list[Rope],
    specs: list[ShadowKVSpec],
    decoded: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    steps: int,
    shape: ModelShape,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Drive one group: prompts p with keys before RoPE and values; rows p * len(specs) + s.

    Returns the outputs of each step, [R, Hq, D], and the ids that each step selected.
    """
    longest = max(pre.shape[1] for pre, _ in layers)
    store = PromptStore(
        shape,
        specs,
        num_prompts=len(layers),
        prompt_tokens=longest,
        new_tokens=steps,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    total = store.prompt_tokens + steps
    tables = []
    for rope in ropes:
        angle = torch.outer(torch.arange(total).double(), torch.tensor(rope.frequencies).double())
        angle = torch.cat((angle, angle), -1)
        tables.append((angle.cos() * rope.factor, angle.sin() * rope.factor))
    store.tables = RotaryTables(
        torch.stack([c for c, _ in tables]).float(),
        torch.stack([s for _, s in tables]).float(),
        torch.arange(len(layers), dtype=torch.int32),
        ropes[0].interleaved,
    )
    rows = [Row(spec, p) for p in range(len(layers)) for spec in specs]
    group = ShadowKVGroup(rows, store, steps)
    q_heads = shape.num_q_heads
    for p, (pre, values) in enumerate(layers):
        prompt = Prompt(p, pre.shape[1], str(p))
        group.begin(prompt)
        keys = ropes[p].turn_all(pre, range(pre.shape[1])).float()
        store.add_layer(0, prompt, keys, values)
        queries = torch.zeros(q_heads, pre.shape[1], shape.head_dim)
        group.prefill_layer(0, prompt, queries, keys, values)
    seen, outputs = spied_selection(group), []
    for step in range(steps):
        q, k, v = decoded(step)
        group.make_room(1)
        group.advance()
        group.append(0, k.float()[:, :, None], v.float()[:, :, None])
        outputs.append(group.attend(0, q.float()[:, :, None], scale)[:, :, 0])
    return outputs, seen


def check(case: Case) -> None:
    """Hold a group of one row against the paper for every decode step."""
    generator = torch.Generator().manual_seed(case.seed)
    rope = case.rope or default_rope(case.dim)
    heads, dim, tokens = case.kv_heads, case.dim, case.tokens
    pre = keys_of(generator, heads, tokens, dim)
    values = torch.randn(heads, tokens, dim, generator=generator)
    new_k = keys_of(generator, heads, case.steps, dim)
    new_v = torch.randn(heads, case.steps, dim, generator=generator)
    queries = torch.randn(heads * case.group, case.steps, dim, generator=generator)
    positions = range(tokens, tokens + case.steps)
    q, k = rope.turn_all(queries, positions), rope.turn_all(new_k, positions)
    q, k = q.float(), k.float()
    shape = ModelShape(1, heads * case.group, heads, dim, 4)
    scale = dim**-0.5
    outputs, seen = run_group(
        [(pre, values)],
        [rope],
        [spec_of(case.setting, **dict(case.spec))],
        lambda i: (q[None, :, i], k[None, :, i], new_v[None, :, i]),
        case.steps,
        shape,
        scale,
    )
    paper = PaperLayer(pre, values, rope, case.setting)
    for i, out in enumerate(outputs):
        chosen = as_sets(seen[i][0]) if seen else [set() for _ in range(heads)]
        agree_on_selection(paper, q[:, i], scale, chosen, case)
        expected = paper.attend(q[:, i], k[:, : i + 1], new_v[:, : i + 1], scale, chosen)
        assert_close(out[0], expected, (case, i))


def setting(**fields) -> Setting:
    return dataclasses.replace(Setting(), **fields)


FULL = 32
"""The key width of the default case: full rank."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 7, FULL])
def test_ranks(seed: int, rank: int) -> None:
    check(Case(setting(rank=rank), seed=seed))


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("tokens", [144, 149])
def test_budgets(budget: int, tokens: int) -> None:
    """None at all, few, and more chunks than are free."""
    chunks = tokens // 8 - 4 - 2
    if budget:
        check(Case(setting(budget_chunks=min(budget, chunks)), tokens=tokens))
    if budget > chunks:
        check(Case(setting(budget_chunks=budget), tokens=tokens))


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("tokens", [97, 160])
def test_chunk_sizes(size: int, tokens: int) -> None:
    """A key is its own landmark in chunks of one: no chunk is more of an outlier than another."""
    outliers = 2 if size > 1 else 0
    case = setting(chunk_size=size, outlier_chunks=outliers, local_chunks=1)
    check(Case(case, tokens=tokens, seed=size))


@pytest.mark.parametrize("outliers", [0, 1, 3, 11])
@pytest.mark.parametrize("local", [0, 1, 4])
def test_outliers_and_local_chunks(outliers: int, local: int) -> None:
    check(Case(setting(outlier_chunks=outliers, local_chunks=local), seed=outliers))


def test_more_outliers_than_chunks() -> None:
    """Every free chunk is an outlier: nothing is left to select."""
    check(Case(setting(outlier_chunks=100), tokens=149))


@pytest.mark.parametrize("tokens", [5, 31, 32, 39])
def test_prompts_within_the_local_chunks(tokens: int) -> None:
    check(Case(setting(), tokens=tokens))


@pytest.mark.parametrize("local", [0, 4])
@pytest.mark.parametrize("budget", [8, 16])
def test_outliers_auto(budget: int, local: int) -> None:
    """192 outlier tokens per 1,024 of budget: 1.5 and 3 chunks, so 2 (a half rounds up) and 3."""
    expected = {8: 2, 16: 3}[budget]
    case = setting(budget_chunks=budget, outlier_chunks=expected, local_chunks=local)
    check(Case(case, tokens=299, spec=()))
    spec = dataclasses.replace(spec_of(case), outlier_chunks="auto")
    assert spec.keeps(299) == spec_of(case).keeps(299)


@pytest.mark.parametrize(("size", "parts"), [(4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (16, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_several_landmarks_a_chunk(size: int, parts: int, seed: int) -> None:
    check(Case(setting(chunk_size=size, landmarks=parts, local_chunks=1), seed=seed))


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (2, 16), (3, 16), (2, 64)])
def test_heads(group: int, heads: int, dim: int) -> None:
    check(Case(setting(rank=7), group=group, kv_heads=heads, dim=dim, seed=group))


ROPES = {
    "half": default_rope(16),
    "partial": Rope(tuple(1e4 ** (-i / 3) for i in range(3))),
    "interleaved": default_rope(16, interleaved=True),
    "interleaved, partial": Rope(tuple(1e4 ** (-i / 4) for i in range(4)), interleaved=True),
    "attention factor": default_rope(16, factor=1.19),
    "all": Rope(tuple(5e5 ** (-i / 4) / 3 for i in range(4)), interleaved=True, factor=0.8),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotations(rope: Rope) -> None:
    check(Case(setting(), rope=rope))


def test_the_references_two_rotations_agree() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for name, rope in ROPES.items():
        slow = torch.stack([rope.turn(x[i], i + 90) for i in range(5)])
        assert torch.allclose(rope.turn_all(x, range(90, 95)), slow, atol=1e-12), name


@pytest.mark.parametrize(
    "buffers",
    [
        {"value_buffer": 2.0, "key_buffer": 2.0},
        {"value_buffer": 4.0},
        {"key_buffer": 3.0},
        {"value_buffer": 1.3, "key_buffer": 2.5},
        {"value_placement": "host"},
        {"value_placement": "host", "value_buffer": 2.0},
    ],
    ids=str,
)
def test_residency_over_many_steps(buffers: dict[str, object]) -> None:
    """What was held from earlier steps is what would be fetched and rebuilt now."""
    check(Case(setting(budget_chunks=5), steps=24, tokens=203, spec=tuple(buffers.items())))


def test_rows_with_unequal_settings_and_prompts() -> None:
    """Ranks, budgets, outliers, buffers and prompt lengths of a group differ by row."""
    generator = torch.Generator().manual_seed(9)
    shape, dim, steps, scale = ModelShape(1, 6, 2, 16, 4), 16, 5, 0.25
    lengths = [203, 61, 150]
    ropes = [default_rope(dim), default_rope(dim, factor=1.3), default_rope(dim, factor=0.9)]
    layers = [
        (keys_of(generator, 2, n, dim), torch.randn(2, n, dim, generator=generator))
        for n in lengths
    ]
    settings = [
        setting(rank=3, budget_chunks=2, outlier_chunks=1),
        setting(rank=32, budget_chunks=9, outlier_chunks=0),
        setting(rank=12, budget_chunks=5, outlier_chunks=6, local_chunks=0),
        setting(rank=12, budget_chunks=1, outlier_chunks=4, local_chunks=1),
    ]
    buffers = [{}, {"value_buffer": 1.5}, {"key_buffer": 2.0}, {"value_buffer": 3.0}]
    specs = [spec_of(s, **b) for s, b in zip(settings, buffers, strict=True)]
    count = len(lengths) * len(specs)
    plain_q = torch.randn(count, 6, steps, dim, generator=generator)
    plain_k = torch.stack([keys_of(generator, 2, steps, dim) for _ in range(count)])
    new_v = torch.randn(count, 2, steps, dim, generator=generator)
    q, k = torch.empty_like(plain_q), torch.empty_like(plain_k)
    for row in range(count):
        p = row // len(specs)
        at = range(lengths[p], lengths[p] + steps)
        q[row], k[row] = ropes[p].turn_all(plain_q[row], at), ropes[p].turn_all(plain_k[row], at)
    outputs, seen = run_group(
        layers,
        ropes,
        specs,
        lambda i: (q[:, :, i], k[:, :, i], new_v[:, :, i]),
        steps,
        shape,
        scale,
    )
    for row in range(count):
        p, s = divmod(row, len(specs))
        paper = PaperLayer(*layers[p], ropes[p], settings[s])
        for i in range(steps):
            case = (lengths[p], settings[s], i)
            chosen = as_sets(seen[i][row])
            agree_on_selection(paper, q[row, :, i], scale, chosen, case)
            expected = paper.attend(
                q[row, :, i], k[row, :, : i + 1], new_v[row, :, : i + 1], scale, chosen
            )
            assert_close(outputs[i][row], expected, case)


# ---- real model classes, every layer, hooked ----


def family_rope(family: str, prompt_tokens: int) -> Rope:
    """The rotation of `tiny_config(family)`, from the families' papers."""
    if family == "llama":  # Llama 3.1: long waves slowed by 8, the middle blended
        frequencies = []
        for i in range(8):
            f = 5e5 ** (-2 * i / 16)
            wave = 2 * math.pi / f
            blend = (128 / wave - 1) / (4 - 1)
            if wave < 128 / 4:
                frequencies.append(f)
            elif wave > 128 / 1:
                frequencies.append(f / 8)
            else:
                frequencies.append((1 - blend) * f / 8 + blend * f)
        return Rope(tuple(frequencies))
    if family == "qwen2":
        return default_rope(16)
    if family == "glm":  # half of the dimensions, neighbours paired
        return Rope(tuple(1e4 ** (-2 * i / 8) for i in range(4)), interleaved=True)
    slow = 4.0 if prompt_tokens > 128 else 1.0
    factor = math.sqrt(1 + math.log(4096 / 128) / math.log(128))
    return Rope(tuple(1e4 ** (-2 * i / 16) / slow for i in range(8)), factor=factor)


@functools.cache
def model_of(family: str) -> LoadedModel:
    return tiny_model(family, seed=3)


class Capture:
    """Queries, keys and values before RoPE, and attention outputs, per layer and forward."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.shape = loaded.shape
        layers = loaded.model.model.layers
        self.q: list[list[Tensor]] = [[] for _ in layers]
        self.k: list[list[Tensor]] = [[] for _ in layers]
        self.v: list[list[Tensor]] = [[] for _ in layers]
        self.out: list[list[Tensor]] = [[] for _ in layers]
        self.hooks = []
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            if hasattr(attention, "qkv_proj"):
                self.hook(attention.qkv_proj, functools.partial(self.split, i))
            else:
                for name, into in (("q", self.q), ("k", self.k), ("v", self.v)):
                    projection = getattr(attention, name + "_proj")
                    self.hook(projection, functools.partial(self.keep, into[i]))
            self.hooks.append(
                attention.o_proj.register_forward_pre_hook(
                    lambda module, args, i=i: self.keep(self.out[i], args[0])
                )
            )

    def hook(self, module, take) -> None:
        self.hooks.append(module.register_forward_hook(lambda module, args, output: take(output)))

    def keep(self, into: list[Tensor], x: Tensor) -> None:
        """[rows, S, heads * D] as [rows, heads, S, D]."""
        into.append(x.detach().unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2).clone())

    def split(self, layer: int, x: Tensor) -> None:
        widths = [self.shape.num_q_heads, self.shape.num_kv_heads, self.shape.num_kv_heads]
        parts = x.split([w * self.shape.head_dim for w in widths], -1)
        for into, part in zip((self.q, self.k, self.v), parts, strict=True):
            self.keep(into[layer], part)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


SETTINGS = [
    setting(rank=7, budget_chunks=4, outlier_chunks=1),
    setting(rank=32, budget_chunks=2, outlier_chunks=0, local_chunks=0),
    setting(rank=1, budget_chunks=9, outlier_chunks=3, local_chunks=1),
    setting(rank=7, chunk_size=4, budget_chunks=5, landmarks=2),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm", "phi3"])
@pytest.mark.parametrize("prompts", [(171,), (101, 139)], ids=str)
def test_a_session_of_every_family(family: str, prompts: tuple[int, ...]) -> None:
    """All layers of a real model class, several cells and prompts in one batch, decode steps."""
    loaded, steps = model_of(family), 3
    shape = loaded.shape
    specs = [spec_of(s) for s in SETTINGS]
    session = Session(
        loaded, specs, prompt_tokens=max(prompts), new_tokens=steps, num_prompts=len(prompts)
    )
    capture = Capture(loaded)
    generator = torch.Generator().manual_seed(sum(prompts))
    try:
        tokens = []
        for p, length in enumerate(prompts):
            ids = torch.randint(3, 256, (length,), generator=generator).tolist()
            tokens += [session.prefill(ids, index=p, key=str(p)).argmax()] * len(specs)
        seen = {}
        for places, group in session.groups:
            seen[tuple(places)] = spied_selection(group)
        step_tokens = torch.stack(tokens)
        for _ in range(steps):
            step_tokens = session.decode_step(step_tokens).argmax(-1)
    finally:
        capture.remove()
    scale = shape.head_dim**-0.5
    for row in range(len(prompts) * len(specs)):
        p, s = divmod(row, len(specs))
        rope = family_rope(family, prompts[p])
        [(places, ids)] = [(g, ids) for g, ids in seen.items() if row in g]
        for layer in range(shape.num_layers):
            paper = PaperLayer(capture.k[layer][p][0], capture.v[layer][p][0], rope, SETTINGS[s])
            decoded = range(len(prompts), len(prompts) + steps)
            plain = [
                torch.cat([x[layer][f][row] for f in decoded], 1)
                for x in (capture.q, capture.k, capture.v)
            ]
            at = range(prompts[p], prompts[p] + steps)
            q, k, v = rope.turn_all(plain[0], at), rope.turn_all(plain[1], at), plain[2]
            for i, f in enumerate(decoded):
                case = (family, prompts[p], SETTINGS[s], layer, i)
                chosen = as_sets(ids[i * shape.num_layers + layer][places.index(row)])
                agree_on_selection(paper, q[:, i], scale, chosen, case)
                expected = paper.attend(q[:, i], k[:, : i + 1], v[:, : i + 1], scale, chosen)
                assert_close(capture.out[layer][f][row, :, 0], expected, case)
