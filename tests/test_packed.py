"""Packed values: not a bit is lost, where they lie, what is refused, and the same answers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import (
    PACKABLE,
    MethodSpec,
    ModelShape,
    ShadowKVSpec,
    ValueForm,
    packed_width,
)
from shadowkv_cli.errors import EXIT_INCOMPLETE, ShadowKVError, UsageError
from shadowkv_cli.methods.value_store import ValueStore
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops import cases, packed
from shadowkv_cli.ops.packed import (
    MOST_STRAYS,
    NAN_BYTE,
    CannotPack,
    Packer,
    pack,
    stray_counts,
    unpack,
)
from shadowkv_cli.ops.sizes import Sizes
from shadowkv_cli.results import read_run
from shadowkv_cli.shared_bytes import shared_cache_bytes
from shadowkv_cli.testing import tiny_model

BF16 = torch.bfloat16
SETTINGS = {"rank": "16", "sparse_budget": "64", "outlier_chunks": "3"}


def spec_of(**fields: object) -> ShadowKVSpec:
    [spec] = build_specs(["shadowkv"], SETTINGS | {k: str(v) for k, v in fields.items()})
    assert isinstance(spec, ShadowKVSpec)
    return spec


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


# ---- the format ----


def as_written(row: bytes, dim: int) -> list[int]:
    """The 16 bits of each element, byte by byte as the format is described."""
    base, count, listed = row[0], row[1], row[2:16]
    lower, codes = row[16 : 16 + dim], row[16 + dim :]
    found = []
    for place in range(dim):
        group, within = divmod(place, 8)
        byte = codes[group * 4 + within % 4]
        code = byte >> 4 if within >= 4 else byte & 0xF
        found.append((code & 0x8) << 12 | base + (code & 0x7) << 8 | lower[place])
    for nth in range(count):
        place, upper = listed[2 * nth], listed[2 * nth + 1]
        found[place] = found[place] & 0xFF | upper << 8
    return found


def strays_of(bits: list[int]) -> int:
    upper = [b >> 8 & 0x7F for b in bits]
    return sum(u < max(*upper, 7) - 7 for u in upper)


def of_bits(bits: list[int]) -> Tensor:
    return torch.tensor([b - 65536 if b >= 32768 else b for b in bits], dtype=torch.int16).view(
        BF16
    )


ANY_BITS = st.integers(0, 0xFFFF)
CLOSE = st.builds(
    lambda sign, exponent, rest: sign << 15 | exponent << 7 | rest,
    st.integers(0, 1), st.integers(118, 134), st.integers(0, 127),
)  # fmt: skip


@given(
    st.sampled_from([8, 16, 64]).flatmap(
        lambda dim: st.lists(
            st.one_of(CLOSE, CLOSE, CLOSE, CLOSE, CLOSE, CLOSE, CLOSE, ANY_BITS),
            min_size=dim, max_size=dim,
        )
    )
)  # fmt: skip
def test_a_token_is_packed_to_the_bit_or_refused(bits: list[int]) -> None:
    """By what its exponents are: zeros, subnormal numbers, infinities and NaN included."""
    token = of_bits(bits)
    if (strays := strays_of(bits)) > MOST_STRAYS:
        with pytest.raises(ShadowKVError, match=f"{strays} of {len(bits)} elements that belong"):
            pack(token[None])
        return
    packed = pack(token[None])
    assert stray_counts(token).item() == strays
    assert packed.shape == (1, packed_width(len(bits)))
    assert same_bits(unpack(packed)[0], token)
    assert as_written(bytes(packed[0].tolist()), len(bits)) == bits


@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
def test_random_values_come_back(dim: int) -> None:
    g = torch.Generator().manual_seed(dim)
    values = torch.randn(3, 500, dim, generator=g).to(BF16)
    packed = pack(values.transpose(0, 1))
    assert packed.shape == (500, 3, 16 + dim * 3 // 2)
    assert same_bits(unpack(packed), values.transpose(0, 1))
    assert int(packed[..., 1].max()) > 0, "some stray"


def test_a_row_at_the_edges_of_the_window() -> None:
    """The lowest exponent that has a code, the first that strays; the lowest base; zeros."""
    one = struct.unpack("<H", b"\x80\x3f")[0]  # 1.0: the exponent 127, the last bit left out 63
    for exponent, strays in ((112, 0), (111, 1), (1, 1), (0, 1)):
        bits = [one, exponent << 7 | 5, *[one] * 6]
        packed = pack(of_bits(bits)[None])
        assert int(packed[0, 1]) == strays, exponent
        assert same_bits(unpack(packed)[0], of_bits(bits))
    for top in (0, 1, 14, 15, 16, 17, 254):
        bits = [e << 7 | e for e in range(max(top - 7, 0), top + 1)]
        bits += [1 << 15] * (8 - len(bits))
        packed = pack(of_bits(bits)[None])
        assert int(packed[0, 0]) == max(top // 2 - 7, 0)
        assert same_bits(unpack(packed)[0], of_bits(bits)), top


def test_any_bytes_are_some_token() -> None:
    """What no step attends is unpacked beside what it attends, whatever lies there."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (3000, packed_width(64)), generator=g, dtype=torch.uint8)
    assert unpack(packed).shape == (3000, 64)
    nothing = unpack(torch.full((2, packed_width(64)), NAN_BYTE, dtype=torch.uint8))
    assert nothing.isnan().sum() == 64, "four of every eight"


# ---- the ops ----


@pytest.mark.parametrize("seed", range(4))
def test_packed_values_are_fetched_and_attended_as_what_they_stand_for(seed: int) -> None:
    sizes = Sizes(rows=4, dim=64, packed=True, device="cpu", seed=seed)
    fetched = cases.fetch_arguments(sizes)
    plain = fetched | {
        "values": unpack(fetched["values"]),
        "buffer": unpack(fetched["buffer"]),
    }
    written = fetched["buffer"].clone()
    ops.fetch_values(**fetched)
    ops.fetch_values(**plain)
    written = (fetched["buffer"] != written).flatten(3).any(-1)
    assert int(written.sum()) == int(fetched["miss_counts"].sum()) > 10
    assert same_bits(unpack(fetched["buffer"])[written], plain["buffer"][written])
    attended = cases.sparse_arguments(sizes)
    slots = unpack(attended["value_buffer"]).flatten(2, 3)
    wide = torch.cat((attended["values"], slots), 2)
    found = ops.sparse_attention(**attended)
    expected = ops.sparse_attention(**attended | {"values": wide, "value_buffer": None})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value_buffer": torch.zeros(3, 2, 9, 8, 64, dtype=torch.uint8)}, "must be [3, 2, 9, 8,"),
        ({"value_scales": torch.zeros(3, 2, 9)}, "value_scales belong to a value_buffer in fp8"),
        ({"value_buffer": torch.zeros(3, 2, 9, 8, 112)}, "or uint8 beside keys in bfloat16"),
        ({"keys": torch.zeros(3, 2, 101, 64)}, "or uint8 beside keys in bfloat16"),
    ],
)
def test_what_is_no_packed_buffer_is_refused(change: dict, words: str) -> None:
    arguments = cases.sparse_arguments(Sizes(packed=True, device="cpu"))
    with pytest.raises(ValueError, match="sparse_attention") as refused:
        ops.sparse_attention(**arguments | change)
    assert words in str(refused.value)


@pytest.mark.parametrize("landmarks", [1, 2])
def test_packed_landmarks_select_as_what_they_stand_for(landmarks: int) -> None:
    sizes = Sizes(rows=4, dim=64, packed=True, landmarks=landmarks, device="cpu")
    arguments = cases.select_arguments(sizes)
    found = ops.select_chunks(**arguments)
    wide = arguments | {"landmarks": unpack(arguments["landmarks"])}
    assert torch.equal(found, ops.select_chunks(**wide))
    assert int((found >= 0).sum()) > 10
    for change, words in (
        ({"query": arguments["query"].float()}, "query must be bfloat16 beside packed landmarks"),
        ({"landmark_scales": torch.ones(1)}, "landmark_scales belong to landmarks in fp8"),
        (
            {"landmarks": arguments["landmarks"][..., :64]},
            r"landmarks must be \[P, Hk, C, L, 112\]",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            ops.select_chunks(**arguments | change)


@pytest.mark.parametrize("name", ["fetch_values", "select_chunks", "sparse_attention"])
def test_ops_are_what_they_say(name: str) -> None:
    arguments = cases.ARGUMENTS[name](Sizes(packed=True, device="cpu", poison=False))
    torch.library.opcheck(getattr(torch.ops.shadowkv, name), tuple(arguments.values()))


# ---- the store ----


def test_values_are_packed_once_for_all_chunk_sizes_and_a_rest_with_them() -> None:
    forms = [ValueForm("host", "packed"), ValueForm("device")]
    for size in (4, 8):
        spec = spec_of(value_dtype="packed", value_placement="host", chunk_size=size)
        assert spec.value_forms(1) == forms[:1]
    store = ValueStore([forms], (2, 3, 40, 16), 44, BF16, torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    for prompt, tokens in ((0, 40), (1, 37)):
        v = torch.randn(3, tokens, 16, generator=g).to(BF16)
        store.add_layer(0, prompt, v)
        for chunk_size in (4, 8):
            chunks, scales = store.chunked(0, chunk_size, forms[0])
            assert scales is None
            assert chunks.shape == (2, 3, 40 // chunk_size, chunk_size, packed_width(16))
            held = chunks[prompt].flatten(1, 2)[:, :tokens]
            assert same_bits(unpack(held), v)


def test_bytes_are_those_that_are_held() -> None:
    specs: list[MethodSpec] = [
        spec_of(value_dtype="packed", value_placement="host", value_buffer=2, resident_layers=1)
    ]
    shape = ModelShape(2, 4, 2, 16, 2)
    session = Session(
        tiny_model("llama", dtype=BF16), specs, prompt_tokens=400, new_tokens=8, num_prompts=3
    )
    held = session.store.value_store.held
    by_place = {
        place: sum(t.nbytes for t in held[ValueForm(place, "packed")].values())  # type: ignore[arg-type]
        for place in ("host", "device")
    }
    assert by_place == dict.fromkeys(("host", "device"), 3 * 400 * 2 * 40)
    assert shared_cache_bytes(specs, shape, 400, 8).host * 3 == by_place["host"]
    (_, group), *_ = session.groups
    [spec] = specs
    assert isinstance(spec, ShadowKVSpec)
    buffers = sum(b.nbytes for b in group.value_buffers)  # type: ignore[attr-defined]
    assert buffers == 3 * 2 * spec.buffer_bytes(shape, 400)[1] == 3 * 2 * 2 * 16 * 8 * 40


# ---- decoding ----


def logits_of(*specs: MethodSpec, tokens: int = 403) -> Tensor:
    """Of given tokens, [steps, R, V]."""
    session = Session(
        tiny_model("llama", dtype=BF16), list(specs), prompt_tokens=tokens, new_tokens=12
    )
    g = torch.Generator().manual_seed(1)
    session.prefill(torch.randint(3, 256, (tokens,), generator=g).tolist(), key="a")
    steps = torch.randint(3, 256, (12,), generator=g)
    return torch.stack([session.decode_step(t.expand(len(specs))) for t in steps])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"value_buffer": 2, "value_placement": "host"},
        {"value_buffer": 4, "key_buffer": 2, "value_placement": "host", "resident_layers": 1},
        {"landmarks_per_chunk": 2, "chunk_size": 4},
    ],
)
@pytest.mark.parametrize("names", [("value",), ("landmark",), ("value", "landmark")], ids=str)
def test_decoding_from_what_is_packed_is_decoding_to_the_bit(
    fields: dict, names: tuple[str, ...]
) -> None:
    exact = logits_of(spec_of(**fields))
    packed = fields | {f"{name}_dtype": "packed" for name in names}
    assert torch.equal(logits_of(spec_of(**packed)), exact)


def test_packed_values_beside_others() -> None:
    """Three cells of one session: two that keep every bit, and one that does not."""
    dtypes = ("model", "packed", "fp8")
    found = logits_of(*(spec_of(value_dtype=dtype) for dtype in dtypes))
    assert torch.equal(found[:, 1], found[:, 0])
    assert not torch.equal(found[:, 2], found[:, 0])


# ---- what is refused, and the command line ----


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        (ModelShape(2, 4, 2, 16, 4), "float32", "the model is in float32: use --dtype bfloat16"),
        (ModelShape(2, 4, 2, 16, 2), "float16", "the model is in float16"),
        (ModelShape(2, 4, 2, 68, 2), "bfloat16", "to 256, not 68"),
        (ModelShape(2, 4, 2, 32, 2), "bfloat16", "from 40, where it begins to save bytes"),
        (ModelShape(2, 4, 2, 320, 2), "bfloat16", "to 256, not 320"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(shape: ModelShape, dtype: str, says: str) -> None:
    with pytest.raises(UsageError, match="value_dtype packed") as refused:
        spec_of(value_dtype="packed").check_model(shape, dtype)
    assert says in str(refused.value)


def test_a_layer_that_cannot_be_packed_is_refused() -> None:
    forms = [ValueForm("device", "packed")]
    store = ValueStore([forms], (1, 1, 40, 16), 40, BF16, torch.device("cpu"))
    v = torch.ones(1, 40, 16, dtype=BF16)
    v[0, 3, :8] = 1e-20
    store.add_layer(0, 0, v)
    with pytest.raises(ShadowKVError, match=r"8 of 16 elements that belong.*use value_dtype=model"):
        store.packer.check()
    store.packer.check()  # It was told of.
    store.add_layer(0, 0, v)
    store.packer.forget()
    store.add_layer(0, 0, torch.ones_like(v))
    store.packer.check()
    with pytest.raises(CannotPack, match=r"landmarks cannot.*use landmark_dtype=model") as refused:
        pack(v, "landmarks")
    assert refused.value.part == "landmarks"


def test_what_is_no_bfloat16_is_not_packed() -> None:
    for values in (torch.zeros(3, 16), torch.zeros(3, 12, dtype=BF16)):
        with pytest.raises(ValueError, match=r"rows must be bfloat16 \[..., 8 n\], got"):
            pack(values)
    assert pack(torch.zeros(0, 16, dtype=BF16)).shape == (0, 40)
    with pytest.raises(CannotPack, match="below the largest, an infinity or NaN, and 7 fit"):
        pack(torch.tensor([[1.0] * 15 + [float("inf")]], dtype=BF16))


@given(most=st.lists(st.integers(0, 16), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_a_packer_tells_of_any_row_that_did_not_fit(most: list[int], seed: int) -> None:
    """However many come before and behind it, in that call and others."""
    generator = torch.Generator().manual_seed(seed)
    packer, worst = Packer(), 0
    for strays in most:
        rows = torch.ones(9, 16, dtype=BF16)
        for row in range(9):
            count = int(torch.randint(0, strays + 1, (1,), generator=generator))
            rows[row, torch.randperm(16, generator=generator)[: min(count, 15)]] = 2.0**-40
        counts = stray_counts(rows)
        packed = packer.pack(rows, "landmarks")
        if int(counts.max()) <= MOST_STRAYS:
            assert same_bits(unpack(packed), rows)
        worst = max(worst, int(counts.max()))
    if worst > MOST_STRAYS:
        with pytest.raises(CannotPack, match=f"landmarks cannot.* {worst} of 16 elements"):
            packer.check()
    packer.check()


def test_the_head_dimension_from_which_bytes_are_saved() -> None:
    smaller = [dim for dim in range(8, 257, 8) if packed_width(dim) < 2 * dim]
    assert smaller == list(range(40, 257, 8))


@pytest.mark.parametrize("part", PACKABLE)
@pytest.mark.parametrize("command", ["eval", "bench", "bench --share"])
def test_what_cannot_be_packed_fails_alone(
    command: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows say so, the other cells have theirs, and the exit code is that of some failures."""
    monkeypatch.setattr(packed, "MOST_STRAYS", 0)
    out, data = tmp_path / "run", tmp_path / "data"
    more = ["--context-length", "1k", "--state", "synthetic", "--decode-steps", "2"]
    more += ["--warmup-steps", "1", "--rounds", "2"]
    if command == "eval":
        build = "build-data ruler --tokenizer demo --context-length 1k --num-samples 1 --seed 5"
        assert run([*build.split(), "--tasks", "niah_single_2", "--output", str(data)]) == 0
        more = ["--data", str(data)]
    option = "--" + PACKABLE[part].replace("_", "-")
    cells = ["--method", "full,shadowkv", option, "model,packed", "--rank", "64"]
    chosen = ["--model", "demo", "--device", "cpu", "--dtype", "bfloat16", "--sparse-budget", "128"]
    assert run([*command.split(), *chosen, *cells, *more, "--output", str(out)]) == EXIT_INCOMPLETE
    found = read_run(out)
    rows = found.predictions if command == "eval" else found.throughput
    errors: dict[tuple[str, str | None], list[str | None]] = {}
    for row in rows:
        cell = row["method"], row["settings"].get(PACKABLE[part])
        errors.setdefault(cell, []).append(row["error"])
    count = 1 if command == "eval" else 2
    failed = errors.pop(("shadowkv", "packed"))
    assert len(failed) == count
    assert all(str(e).startswith(f"{part} cannot be packed to the bit") for e in failed), failed
    assert errors == {("full", None): [None] * count, ("shadowkv", "model"): [None] * count}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answers and fewer bytes; a model in float32 is refused before it is prefilled."""
    data, out = tmp_path / "data", tmp_path / "run"
    build = "build-data ruler --tokenizer demo --context-length 1k --num-samples 3 --seed 5"
    assert run([*build.split(), "--tasks", "niah_multikey_1", "--output", str(data)]) == 0
    command = ["eval", "--model", "demo", "--device", "cpu", "--data", str(data)]
    command += ["--method", "shadowkv", "--sparse-budget", "128", "--rank", "128"]
    command += ["--value-placement", "host", "--value-dtype", "model,packed"]
    capsys.readouterr()
    assert run([*command, "--output", str(tmp_path / "other"), "--dtype", "float32"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "value_dtype packed holds bfloat16" in said
    assert run([*command, "--dtype", "bfloat16", "--output", str(out)]) == 0
    rows = {(r["settings"]["value_dtype"], r["id"]): r for r in read_run(out).predictions}
    assert len(rows) == 6
    for (kept_in, sample), row in rows.items():
        plain = rows[("model", sample)]
        assert row["prediction"] == plain["prediction"]
        if kept_in == "packed":
            # 64 elements of a head: 112 bytes instead of 128.
            assert row["host_bytes"] * 8 == plain["host_bytes"] * 7, json.dumps(row)
