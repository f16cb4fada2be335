"""Settings: what is read, what is refused, what is kept of a prompt, and what it costs in bytes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shadowkv_cli.cells import build_specs, grid, one_at_a_time
from shadowkv_cli.config import (
    SPECS,
    FullSpec,
    Kept,
    MethodSpec,
    ModelShape,
    RandomSpec,
    ShadowKVSpec,
    SparseBudget,
    SparseSpec,
    StreamingSpec,
    parse_token_count,
    spec_fields,
    split_list,
)
from shadowkv_cli.errors import UsageError
from shadowkv_cli.methods import Prompt, PromptStore, RotaryTables, Row, build_groups

SHARE = Fraction(1, 64)


# ---- token counts and lists ----


@given(st.integers(1, 10**9), st.sampled_from(["", "k", "K", "m", "M"]))
def test_token_counts(count: int, unit: str) -> None:
    times = {"": 1, "k": 1024, "m": 1024 * 1024}[unit.lower()]
    assert parse_token_count(f"{count}{unit}") == count * times
    assert parse_token_count(f"  {count} {unit} ") == count * times


@given(st.integers(1000, 10**9))
def test_token_counts_with_underscores(count: int) -> None:
    assert parse_token_count(f"{count:_}") == count


@pytest.mark.parametrize(
    "text", ["", " ", "0", "0k", "-4", "4.5", "4kk", "k", "4g", "four", "1e3", "4_", "_4", "4 k 2"]
)
def test_what_is_no_token_count(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_token_count(text)
    assert f"'{text}'" in str(error.value)
    assert "4k" in str(error.value)
    assert "\n" not in str(error.value)


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=4)


@given(st.lists(st.lists(NAMES, min_size=1), max_size=4))
def test_lists_as_commas_or_repeats(groups: list[list[str]]) -> None:
    flat = [name for group in groups for name in group]
    expected = list(dict.fromkeys(flat))
    assert split_list(flat) == expected
    assert split_list(",".join(group) for group in groups) == expected
    assert split_list(" , ".join(group) + " ," for group in groups) == expected


# ---- the sparse budget ----


@given(st.integers(1, 10**7))
def test_a_budget_in_tokens_survives_its_text(tokens: int) -> None:
    budget = SparseBudget.parse(str(tokens))
    assert budget == SparseBudget(tokens=tokens)
    assert SparseBudget.parse(str(budget)) == budget
    assert budget.resolve(123, 8) == tokens


@given(st.integers(1, 10**6), st.integers(0, 4))
@example(15625, 4)
def test_a_share_survives_its_text(digits: int, decimals: int) -> None:
    text = f"{digits / 10**decimals:.{decimals}f}%"
    share = Fraction(digits, 10**decimals) / 100
    if not 0 < share <= 1:
        with pytest.raises(UsageError, match="sparse budget"):
            SparseBudget.parse(text)
        return
    budget = SparseBudget.parse(text)
    assert budget == SparseBudget(share=share)
    assert SparseBudget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["1/3%", "1.00000000000001%", "0.1234567890123456%"])
def test_every_share_that_is_taken_survives_its_text(text: str) -> None:
    """Manifests hold the text, and rows are told apart by it."""
    try:
        budget = SparseBudget.parse(text)
    except UsageError:
        return
    assert SparseBudget.parse(str(budget)) == budget, str(budget)


@pytest.mark.parametrize("text", ["0%", "-1%", "101%", "%", "x%", "nan%", "inf%", "1/0%", "", "0"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError) as error:
        SparseBudget.parse(text)
    assert f"'{text}'" in str(error.value)


@pytest.mark.parametrize(
    ("prompt_tokens", "chunk_size", "expected"),
    [
        (131_072, 8, 2048),
        (130_560, 8, 2040),  # exactly 2,040: a whole number of chunks
        (130_561, 8, 2048),  # the next token rounds up to the next chunk
        (2040 * 64, 8, 2040),
        (122_880, 8, 1920),
        (4096, 8, 64),
        (4097, 8, 72),
        (1, 8, 8),
        (4096, 7, 70),
        (4096, 48, 96),
    ],
)
def test_a_share_is_rounded_up_to_a_chunk(
    prompt_tokens: int, chunk_size: int, expected: int
) -> None:
    budget = SparseBudget.parse("1.5625%")
    assert budget.resolve(prompt_tokens, chunk_size) == expected


@given(st.integers(1, 10**6), st.integers(1, 128), st.fractions("1/10000", 1))
def test_a_share_is_the_least_whole_chunk(tokens: int, size: int, share: Fraction) -> None:
    found = SparseBudget(share=share).resolve(tokens, size)
    assert found % size == 0
    assert found >= share * tokens > found - size


# ---- what is kept ----


@pytest.mark.parametrize(
    ("budget", "size", "expected"),
    [
        (2048, 8, 48),  # the paper
        (1024, 8, 24),
        (4096, 8, 96),
        (2040, 8, 48),  # 47.8: the official code's integer division makes it 24
        (2048, 16, 24),
        (2048, 4, 96),
        (64, 8, 2),  # 1.5
        (32, 8, 1),  # 0.75
        (16, 8, 1),  # 0.375, at least one
        (8, 8, 1),
        (64, 64, 1),
    ],
)
def test_outliers_auto(budget: int, size: int, expected: int) -> None:
    spec = ShadowKVSpec(sparse_budget=SparseBudget(tokens=budget), chunk_size=size)
    assert spec.keeps(131_072).outlier_chunks == expected


@pytest.mark.parametrize(
    ("fields", "prompt_tokens", "expected"),
    [
        ({}, 131_072, Kept(256, 48, 32, 8)),
        ({}, 122_881, Kept(241, 45, 33, 8)),  # 1,921 to 1,928 tokens; 45.2 outliers
        ({}, 131_079, Kept(257, 48, 39, 8)),
        ({"local_chunks": 0}, 131_072, Kept(256, 48, 0, 8)),
        ({"local_chunks": 0}, 131_075, Kept(257, 48, 3, 8)),
        ({"outlier_chunks": 0}, 131_072, Kept(256, 0, 32, 8)),
        ({"chunk_size": 16}, 131_072, Kept(128, 24, 64, 16)),
        # Shorter than what is wanted: local first, then outliers, then the selection.
        ({"sparse_budget": "2048"}, 400, Kept(0, 46, 32, 8)),
        ({"sparse_budget": "2048", "outlier_chunks": 6}, 400, Kept(40, 6, 32, 8)),
        ({"sparse_budget": "64", "outlier_chunks": 0}, 33, Kept(0, 0, 33, 8)),
        ({"sparse_budget": "64"}, 20, Kept(0, 0, 20, 8)),
        ({"sparse_budget": "64"}, 47, Kept(0, 1, 39, 8)),
    ],
)
def test_kept_by_hand(fields: dict[str, object], prompt_tokens: int, expected: Kept) -> None:
    if "sparse_budget" in fields:
        fields = fields | {"sparse_budget": SparseBudget.parse(str(fields["sparse_budget"]))}
    kept = ShadowKVSpec(**fields).keeps(prompt_tokens)
    assert kept == expected
    assert kept.tokens == kept.selected_tokens + kept.outlier_tokens + kept.local_tokens


@st.composite
def sparse_specs(draw: st.DrawFn) -> SparseSpec:
    size = draw(st.integers(1, 20))
    budget = draw(
        st.one_of(
            st.integers(1, 60).map(lambda n: SparseBudget(tokens=n * size)),
            st.fractions("1/1000", 1).map(lambda s: SparseBudget(share=s)),
        )
    )
    return ShadowKVSpec(
        sparse_budget=budget,
        chunk_size=size,
        outlier_chunks=draw(st.one_of(st.just("auto"), st.integers(0, 40))),
        local_chunks=draw(st.integers(0, 6)),
    )


@given(sparse_specs(), st.integers(1, 2000))
def test_never_more_is_kept_than_the_prompt_has(spec: SparseSpec, tokens: int) -> None:
    kept = spec.keeps(tokens)
    assert kept.tokens <= tokens
    assert min(kept.selected_chunks, kept.outlier_chunks, kept.local_tokens) >= 0
    wanted = spec.wanted(tokens)
    assert kept.selected_chunks <= wanted.selected_chunks
    assert kept.outlier_chunks <= wanted.outlier_chunks
    # Dense is what attends everything, and a method that keeps less than all is never dense.
    assert spec.is_dense(tokens) == (wanted.tokens >= tokens)
    if kept.tokens < tokens:
        assert not spec.is_dense(tokens)


@given(sparse_specs(), st.integers(1, 2000), st.integers(0, 500))
def test_room_made_for_a_longer_prompt_holds_a_shorter(
    spec: SparseSpec, tokens: int, longer: int
) -> None:
    """Groups are sized by the longest prompt in whole chunks, and a chunk more of local tokens."""
    most = spec.keeps(math.ceil((tokens + longer) / spec.chunk_size) * spec.chunk_size)
    kept = spec.keeps(tokens)
    assert kept.selected_chunks <= most.selected_chunks
    assert kept.outlier_chunks <= most.outlier_chunks
    assert kept.local_tokens <= most.local_tokens + spec.chunk_size


def test_dense() -> None:
    spec = ShadowKVSpec(sparse_budget=SparseBudget(tokens=64))  # 64 + 16 + 32
    assert spec.is_dense(112)
    assert spec.is_dense(119), "a remainder of 7 is kept too"
    assert not spec.is_dense(120)
    never = ShadowKVSpec(sparse_budget=SparseBudget(tokens=64), dense_fallback="never")
    assert not never.is_dense(8)
    assert FullSpec().is_dense(10**6)
    assert FullSpec().keeps(100) is None


# ---- methods and grids from the command line ----


def test_methods_as_commas_repeats_and_settings() -> None:
    expected = [FullSpec(), ShadowKVSpec(rank=64, chunk_size=4)]
    for methods in (
        ["full,shadowkv:rank=64,chunk_size=4"],
        ["full", "shadowkv:rank=64,chunk_size=4"],
        ["full", "shadowkv:chunk-size=4, rank = 64"],
    ):
        assert build_specs(methods, {}) == expected, methods
    two = build_specs(["shadowkv:rank=64,shadowkv:rank=32,random"], {"seed": None})
    assert two == [ShadowKVSpec(rank=64), ShadowKVSpec(rank=32), RandomSpec()]


def test_options_set_every_method_that_has_the_field() -> None:
    specs = build_specs(
        ["full", "shadowkv:chunk_size=4", "random"],
        {"chunk_size": "16", "rank": "32", "sparse_budget": "2k", "outlier_chunks": "3"},
    )
    budget = SparseBudget(tokens=2048)
    assert specs == [
        FullSpec(),
        ShadowKVSpec(chunk_size=4, rank=32, sparse_budget=budget, outlier_chunks=3),
        RandomSpec(chunk_size=16, sparse_budget=budget, outlier_chunks=3),
    ]


def test_every_field_can_be_set_by_its_text() -> None:
    """What `settings` prints is what the command line takes."""
    others = {
        "sparse_budget": "64",
        "chunk_size": "4",
        "outlier_chunks": "7",
        "local_chunks": "2",
        "dense_fallback": "never",
        "rank": "12",
        "landmarks_per_chunk": "2",
        "value_placement": "host",
        "value_buffer": "2.5",
        "key_buffer": "1.5",
        "value_dtype": "fp8",
        "landmark_dtype": "fp8",
        "resident_layers": "3",
        "seed": "7",
        "sink_tokens": "9",
    }
    for name, spec in SPECS.items():
        fields = spec_fields(spec)
        [built] = build_specs([name], {f: others[f] for f in fields})
        assert {k: str(v) for k, v in built.settings().items()} == {f: others[f] for f in fields}
        assert list(built.settings()) == fields
        [again] = build_specs([built.cell], {})
        assert again == built, built.cell


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        (["shadowk"], {}, ["shadowk", "Did you mean 'shadowkv'"]),
        (["quest"], {}, ["quest", "full", "oracle", "random", "shadowkv", "streaming"]),
        (["shadowkv:rnk=4"], {}, ["rnk", "Did you mean 'rank'"]),
        (["full:rank=4"], {}, ["rank", "full"]),
        (["rank=4"], {}, ["rank=4", "NAME:key=value"]),
        (["shadowkv:rank"], {}, ["rank", "key=value"]),
        (["shadowkv:rank=x"], {}, ["rank", "'x'"]),
        (["shadowkv:rank=1.5"], {}, ["rank", "'1.5'"]),
        (["shadowkv"], {"rank": "0"}, ["rank", "at least 1", "0"]),
        (["shadowkv"], {"rank": "-3"}, ["rank", "-3"]),
        (["shadowkv"], {"chunk_size": "0"}, ["chunk_size", "0"]),
        (["shadowkv"], {"local_chunks": "-1"}, ["local_chunks", "-1"]),
        (["shadowkv"], {"outlier_chunks": "-1"}, ["outlier_chunks", "-1"]),
        (["shadowkv"], {"outlier_chunks": "many"}, ["outlier_chunks", "many"]),
        (["shadowkv"], {"sparse_budget": "100"}, ["100", "chunk_size 8", "96", "104"]),
        (["shadowkv"], {"sparse_budget": "5"}, ["5", "8"]),
        (["shadowkv"], {"sparse_budget": "0"}, ["'0'"]),
        (["shadowkv"], {"sparse_budget": "200%"}, ["200%", "100%"]),
        (["shadowkv"], {"landmarks_per_chunk": "3"}, ["landmarks_per_chunk", "3", "1, 2 or 4"]),
        (["shadowkv:chunk_size=6,landmarks_per_chunk=4"], {}, ["6", "4"]),
        (["shadowkv"], {"value_placement": "gpu"}, ["value_placement", "gpu", "device", "host"]),
        (["shadowkv"], {"value_buffer": "0.5"}, ["value_buffer", "0.5", "at least 1"]),
        (["shadowkv"], {"value_buffer": "nan"}, ["value_buffer", "nan"]),
        (["shadowkv"], {"key_buffer": "inf"}, ["key_buffer", "inf"]),
        (["shadowkv"], {"value_dtype": "bf16"}, ["value_dtype", "bf16", "model", "fp8"]),
        (["shadowkv"], {"landmark_dtype": "e5m2"}, ["landmark_dtype", "e5m2", "model", "fp8"]),
        (["shadowkv"], {"dense_fallback": "yes"}, ["dense_fallback", "yes", "auto", "never"]),
        (["streaming"], {"sink_tokens": "-1"}, ["sink_tokens", "-1"]),
        (["full"], {"rank": "4"}, ["--rank", "full"]),
        (["full,oracle"], {"landmarks_per_chunk": "2"}, ["--landmarks-per-chunk", "oracle"]),
        (["full", "full"], {}, ["full", "twice"]),
        (["shadowkv", "shadowkv:rank=160"], {}, ["shadowkv", "twice"]),
    ],
)
def test_errors_name_the_value_and_the_way_out(
    methods: list[str], options: dict[str, str | None], words: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        build_specs(methods, options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)


def test_a_setting_given_twice() -> None:
    """Which of the two was meant is not for the program to guess."""
    with pytest.raises(UsageError, match="rank"):
        build_specs(["shadowkv:rank=64,rank=32"], {})


def test_rank_above_the_key_width() -> None:
    shape = ModelShape(2, 4, 2, 16, 4)
    ShadowKVSpec(rank=32).check_model(shape, "float32")
    with pytest.raises(UsageError, match=r"rank 33 .* 32 "):
        ShadowKVSpec(rank=33).check_model(shape, "float32")


def test_a_trailing_comma_names_no_method() -> None:
    assert build_specs(["full,shadowkv,"], {}) == [FullSpec(), ShadowKVSpec()]


def test_a_grid_has_every_cell_once() -> None:
    axes = {"rank": ["16", "32"], "chunk_size": ["4", "8"], "sparse_budget": ["64", "1.5625%"]}
    cells = grid(["full", "shadowkv", "oracle"], axes)
    shadow = [c for c in cells if isinstance(c, ShadowKVSpec)]
    assert len(shadow) == 8
    assert len([c for c in cells if c.name == "oracle"]) == 4, "oracle has no rank"
    assert cells.count(FullSpec()) == 1
    assert len(cells) == 13
    expected = set(itertools.product((16, 32), (4, 8), ("64", "1.5625%")))
    assert {(c.rank, c.chunk_size, str(c.sparse_budget)) for c in shadow} == expected
    assert len({c.cell for c in cells}) == 13
    assert cells == grid(["full", "shadowkv", "oracle"], axes)


def test_a_grid_beside_a_fixed_method() -> None:
    """A method whose own setting takes the axis away appears once."""
    cells = grid(["shadowkv", "shadowkv:rank=8"], {"rank": ["16", "32"]})
    assert {c.rank for c in cells} == {8, 16, 32}
    assert len(cells) == 3


def test_a_grid_that_meets_a_fixed_method() -> None:
    """The same cell from two sides is one cell: it is measured once."""
    cells = grid(["shadowkv", "shadowkv:rank=16"], {"rank": ["16", "32"]})
    assert {c.rank for c in cells} == {16, 32}


@pytest.mark.parametrize(
    "axes",
    [
        {"sparse_budget": ["64", "100"]},
        {"rank": ["16", "0"]},
        {"chunk_size": ["8", "12"], "landmarks_per_chunk": ["1", "8"]},
        {"nothing": ["1"]},
    ],
)
def test_a_grid_refuses_impossible_cells(axes: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError):
        grid(["full", "shadowkv"], axes)


def test_cells() -> None:
    assert ShadowKVSpec().cell == "shadowkv"
    assert FullSpec().cell == "full"
    spec = ShadowKVSpec(rank=64, sparse_budget=SparseBudget(tokens=512), outlier_chunks=0)
    assert spec.cell == "shadowkv:sparse_budget=512,outlier_chunks=0,rank=64"
    [again] = build_specs([spec.cell], {})
    assert again == spec


@given(sparse_specs(), sparse_specs())
@settings(deadline=None)
def test_cells_tell_settings_apart(a: SparseSpec, b: SparseSpec) -> None:
    assert (a.cell == b.cell) == (a == b) or str(a.sparse_budget) == str(b.sparse_budget)


def test_shares_of_one_label_are_one_share() -> None:
    a, b = (
        ShadowKVSpec(sparse_budget=SparseBudget.parse(text))
        for text in ("2.00000000000001%", "2.00000000000002%")
    )
    assert a == b or a.cell != b.cell


# ---- bytes ----


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held_bytes(spec: MethodSpec, shape: ModelShape, tokens: int, new: int) -> dict[str, int]:
    """Bytes that a lone row of a method really holds, by what holds them."""
    dtype = torch.bfloat16 if shape.element_bytes == 2 else torch.float32
    store = PromptStore(
        shape,
        [spec],
        num_prompts=1,
        prompt_tokens=tokens,
        new_tokens=new,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    total = store.prompt_tokens + new
    store.tables = RotaryTables(
        torch.ones(1, total, shape.head_dim),
        torch.zeros(1, total, shape.head_dim),
        torch.zeros(1, dtype=torch.int32),
        False,
    )
    [(_, group)] = build_groups([Row(spec, 0)], store, new)
    group.begin(Prompt(0, tokens, ""))
    names = ("keys", "values", "value_buffers", "value_scales")
    spaces = [space for name in names for space in getattr(group, name, [])]
    tables = []
    for held in (getattr(group, "key_tables", []), getattr(group, "value_tables", [])):
        tables += [t for x in held for t in (x.chunk_of_slot, x.last_used, x.slot_of_chunk)]
    tables = list({id(t): t for t in tables}.values()) + list(getattr(group, "excluded", []))
    landmarks = [t for layers in store.landmarks.values() for t in layers]
    landmarks += [t for layers in store.landmark_scales.values() for t in layers]
    # What follows the prompt is full attention's; `test_methods.py` says who must not have it.
    values = [
        t if spec.name != "shadowkv" else t[:, :, : store.prompt_tokens]
        for layers in store.value_store.held.values()
        for t in layers.values()
    ]
    values += [t for layers in store.value_store.scales.values() for t in layers.values()]
    return {
        "keys and values": nbytes(*store.keys, *values),
        "low rank": nbytes(*store.coefficients, *store.basis),
        "landmarks": nbytes(*landmarks),
        "spaces": nbytes(*spaces),
        "tables": nbytes(*tables),
    }


BYTES_SHAPE = ModelShape(2, 8, 4, 64, 2)


@pytest.mark.parametrize("tokens", [4096, 4093])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_bytes_of_full_attention(tokens: int, element_bytes: int) -> None:
    shape = ModelShape(2, 8, 4, 64, element_bytes)
    spec, held = FullSpec(), held_bytes(FullSpec(), shape, tokens, 100)
    counted = spec.cache_bytes(shape, tokens, 100)
    assert counted.host == 0
    assert counted.device == sum(held.values()) == 2 * 2 * (tokens + 100) * 256 * element_bytes


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank": 32, "landmarks_per_chunk": 2},
        {"value_buffer": 4.0, "key_buffer": 2.0},
        {"chunk_size": 16, "outlier_chunks": 0, "local_chunks": 0},
        {"value_dtype": "fp8", "landmark_dtype": "fp8", "landmarks_per_chunk": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [4096, 4093])
def test_bytes_of_shadowkv(tokens: int, fields: dict[str, object], placement: str) -> None:
    """All but what rounding up to a chunk, one more chunk of local tokens and whole words add."""
    new, size = 100, int(fields.get("chunk_size", 8))
    spec = ShadowKVSpec(**({"rank": 64} | fields | {"value_placement": placement}))
    held = held_bytes(spec, BYTES_SHAPE, tokens, new)
    counted = spec.cache_bytes(BYTES_SHAPE, tokens, new)
    kept = spec.keeps(tokens)
    token_bytes = 2 * 256 * 2  # of two layers, keys or values
    values = tokens * token_bytes // (2 if spec.value_dtype == "fp8" else 1)
    assert counted.host == (values if placement == "host" else 0)
    # Rounded up to a chunk: the prompt, and so the budget, an outlier and the slots by one each.
    spare = 2 * token_bytes * (2 * size)
    spare += token_bytes * size * (2 + math.ceil(spec.value_buffer) + math.ceil(spec.key_buffer))
    spare += size * (token_bytes + 2 * 2 * spec.rank) + token_bytes * spec.landmarks_per_chunk
    spare += 2 * 4 * 4 * (1 + math.ceil(spec.value_buffer))  # scales a layer and head
    # Of a chunk, and of a slot of each table.
    spare += 2 * 4 * (2 * 4 + 1 + 8 * (math.ceil(spec.value_buffer) + math.ceil(spec.key_buffer)))
    spare += 2 * 4 * 16  # flags in whole words
    total = sum(held.values())
    over = total - counted.device - counted.host
    case = (tokens, fields, placement, kept, held)
    assert over >= 0, case
    assert over <= spare, (over, spare, case)


@pytest.mark.parametrize("name", ["streaming", "oracle", "random"])
def test_bytes_of_the_controls(name: str) -> None:
    """Within a tenth of what they hold: what is planned by them must not be off by a factor."""
    [spec] = build_specs([name], {"dense_fallback": "never"})
    held = held_bytes(spec, BYTES_SHAPE, 4096, 100)
    counted = spec.cache_bytes(BYTES_SHAPE, 4096, 100)
    total = sum(v for k, v in held.items() if k != "tables")
    assert abs(counted.device + counted.host - total) < 0.1 * total, (counted, held)


def test_a_dense_answer_costs_what_full_attention_costs() -> None:
    spec = ShadowKVSpec()
    assert spec.is_dense(40)
    assert spec.cache_bytes(BYTES_SHAPE, 40, 8) == FullSpec().cache_bytes(BYTES_SHAPE, 40, 8)


def test_sinks_are_part_of_what_streaming_attends() -> None:
    """Streaming keeps as many tokens as ShadowKV: its spec says so."""
    assert StreamingSpec().keeps(5000) == ShadowKVSpec().keeps(5000)


def test_one_setting_at_a_time_makes_a_star() -> None:
    axes = {"sparse_budget": ["128", "32", "64"], "rank": ["96", "16"], "chunk_size": ["8"]}
    cells = one_at_a_time(["full", "shadowkv", "oracle:sparse_budget=64"], axes)
    shadow = [c for c in cells if isinstance(c, ShadowKVSpec)]
    found = [(str(c.sparse_budget), c.rank, c.chunk_size) for c in shadow]
    assert found == [("128", 96, 8), ("32", 96, 8), ("64", 96, 8), ("128", 16, 8)]
    assert [c.name for c in cells if c.name != "shadowkv"] == ["full", "oracle"]
    assert set(cells) <= set(grid(["full", "shadowkv", "oracle:sparse_budget=64"], axes))
    with pytest.raises(UsageError, match="no effect"):
        one_at_a_time(["full"], axes)
