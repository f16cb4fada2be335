"""Values and landmarks in fp8: how far they are off, where they lie, what is answered with them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shadowkv_cli import ops
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import MethodSpec, ModelShape, ShadowKVSpec, ValueForm
from shadowkv_cli.methods import Prompt, PromptStore, RotaryTables
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops import cases
from shadowkv_cli.ops.fp8 import FP8, dequantise, quantise
from shadowkv_cli.ops.sizes import Sizes
from shadowkv_cli.results import read_run
from shadowkv_cli.shared_bytes import shared_cache_bytes
from shadowkv_cli.stats import paired_difference
from shadowkv_cli.testing import tiny_model

FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)
SETTINGS = {"rank": "16", "sparse_budget": "64", "outlier_chunks": "3"}


def spec_of(**fields: object) -> ShadowKVSpec:
    [spec] = build_specs(["shadowkv"], SETTINGS | {k: str(v) for k, v in fields.items()})
    assert isinstance(spec, ShadowKVSpec)
    return spec


# ---- rounding ----


def assert_within_bound(x: Tensor, rounded: Tensor, scales: Tensor, case: object) -> None:
    """Half a step of e4m3: of 3 bits behind the point, or 2^-9 of the scale where it is small."""
    found = dequantise(rounded, scales).double()
    unit = scales.double()[(..., *(None,) * (x.dim() - scales.dim()))]
    bound = torch.maximum(x.double().abs() / 16, unit / 1024) * (1 + 1e-5)
    assert bool(((found - x.double()).abs() <= bound).all()), case


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_the_error_is_half_a_step_at_most(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    rounded, scale = quantise(x, 1)
    assert rounded.dtype == FP8
    assert scale.shape == ()
    assert bool(torch.isfinite(rounded.float()).all())
    assert_within_bound(x, rounded, scale, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 3e4])
def test_scales_are_those_of_the_last_dimensions(
    dtype: torch.dtype, dims: int, size: float
) -> None:
    g = torch.Generator().manual_seed(dims)
    x = torch.randn(3, 5, 8, 16, generator=g) * torch.rand(3, 5, 1, 1, generator=g)
    x = (x / x.abs().max() * size).to(dtype)
    rounded, scales = quantise(x, dims)
    assert scales.shape == x.shape[:-dims]
    assert scales.dtype == torch.float32
    assert_within_bound(x, rounded, scales, (dtype, dims, size))
    for index in ((0, 0), (2, 4)):
        alone, own = quantise(x[index], dims)
        assert torch.equal(own, scales[index])
        assert torch.equal(alone.float(), rounded[index].float())


def test_zeros_stay_zeros() -> None:
    rounded, scales = quantise(torch.zeros(2, 8, 4), 2)
    assert not dequantise(rounded, scales).any()
    mixed = torch.zeros(2, 4)
    mixed[1] = torch.tensor([1.0, -2.0, 0.0, 448.0])
    assert torch.equal(dequantise(*quantise(mixed, 1)), mixed), "these are all numbers of e4m3"


# ---- the ops ----


def select_arguments(rows: int = 3, chunks: int = 60, landmarks: int = 2) -> list:
    g = torch.Generator().manual_seed(landmarks)
    return [
        torch.randn(rows, 4, 16, generator=g),
        torch.randn(2, 2, chunks, landmarks, 16, generator=g) * 3,
        None,
        torch.tensor([1, 0, 1], dtype=torch.int32),
        torch.tensor([chunks, chunks - 7, 20], dtype=torch.int32),
        torch.rand(rows, 2, chunks, generator=g) < 0.2,
        torch.tensor([9, 5, 9], dtype=torch.int32),
        9,
        0.25,
    ]


@pytest.mark.parametrize("landmarks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_landmarks_in_fp8_select_as_what_they_stand_for(landmarks: int, dtype: torch.dtype) -> None:
    """The products are float32's, whatever the query's dtype."""
    arguments = select_arguments(landmarks=landmarks)
    arguments[0] = arguments[0].to(dtype)
    rounded, scales = quantise(arguments[1], 1)
    found = ops.select_chunks(arguments[0], rounded, scales, *arguments[3:])
    wide = dequantise(rounded, scales)
    assert torch.equal(found, ops.select_chunks(arguments[0].float(), wide, None, *arguments[3:]))
    exact = ops.select_chunks(arguments[0].float(), *arguments[1:])
    pairs = zip(found[0].tolist(), exact[0].tolist(), strict=True)
    shared = [len(set(a) & set(b)) / len(set(b)) for a, b in pairs]
    assert min(shared) > 0.5, shared


def test_what_lies_beyond_in_fp8_is_ignored() -> None:
    arguments = select_arguments()
    rounded, scales = quantise(arguments[1], 1)
    plain = ops.select_chunks(arguments[0], rounded, scales, *arguments[3:])
    for r, prompt in enumerate(arguments[3].tolist()):
        last = max(
            int(n) for n, p in zip(arguments[4], arguments[3], strict=True) if int(p) == prompt
        )
        scales[prompt, :, last:] = math.nan if r else math.inf
        rounded.view(torch.uint8)[prompt, :, last:] = 0x7F  # NaN
    assert torch.equal(ops.select_chunks(arguments[0], rounded, scales, *arguments[3:]), plain)


def test_scales_of_other_landmarks_are_refused() -> None:
    arguments = select_arguments()
    rounded, scales = quantise(arguments[1], 1)
    with pytest.raises(ValueError, match=r"landmark_scales must be \[2, 2, 60, 2\]"):
        ops.select_chunks(arguments[0], rounded, scales[..., :1], *arguments[3:])


@pytest.mark.parametrize("seed", range(4))
def test_values_are_fetched_as_they_are_with_their_scales(seed: int) -> None:
    """Chunk by chunk; what is not missing stays as it was."""
    sizes = Sizes(dim=6, chunk_size=3, fp8=True, device="cpu", seed=seed)
    arguments = cases.fetch_arguments(sizes)
    values, scales, index, ids, slots, misses, counts, buffer, held = arguments.values()
    assert int(counts.sum()) > 10
    ops.fetch_values(**arguments)
    for r, h in itertools.product(range(sizes.rows), range(sizes.heads)):
        written = set()
        for place in misses[r, h, : counts[r, h]].tolist():
            chunk, slot = int(ids[r, h, place]), int(slots[r, h, place])
            written.add(slot)
            expected = values[index[r], h, chunk].view(torch.uint8)
            assert torch.equal(buffer[r, h, slot].view(torch.uint8), expected), (seed, r, h, place)
            assert held[r, h, slot] == scales[index[r], h, chunk]
        others = [slot for slot in range(sizes.slots) if slot not in written]
        assert bool(buffer[r, h, others].float().isnan().all())
        assert bool(held[r, h, others].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_buffer_in_fp8_is_attended_as_what_it_stands_for(dtype: torch.dtype, seed: int) -> None:
    """To the bit as if each of its values, scaled and rounded once, lay behind the fixed part."""
    sizes = Sizes(rows=4, dim=64, dtype=dtype, fp8=True, device="cpu", seed=seed)
    arguments = cases.sparse_arguments(sizes)
    wide = dequantise(arguments["value_buffer"], arguments["value_scales"]).to(dtype)
    values = torch.cat((arguments["values"], wide.flatten(2, 3)), 2)
    plain = arguments | {"values": values, "value_buffer": None, "value_scales": None}
    for found, expected in zip(
        ops.sparse_attention(**arguments), ops.sparse_attention(**plain), strict=True
    ):
        assert torch.equal(found, expected)
    some = (arguments["value_slots"] >= 0).any(2).any(1)
    assert bool(some.any())
    assert bool(ops.sparse_attention(**arguments)[0].isfinite().all())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fetch_values", {"scales": lambda x: x[:, :, :5]}, r"scales must be \[2, 2, 40\]"),
        ("fetch_values", {"buffer_scales": lambda x: x[:, :, :5]}, r"scales must be \[3, 2, 9\]"),
        ("fetch_values", {"scales": lambda x: None}, "scales and buffer_scales come together"),
        ("fetch_values", {"values": lambda x: x.bfloat16()}, "values must be torch.float8_e4m3fn"),
        ("sparse_attention", {"value_scales": lambda x: None}, "value_scales belong to"),
        ("sparse_attention", {"value_scales": lambda x: x.bfloat16()}, "scales must be float32"),
        ("sparse_attention", {"value_buffer": lambda x: x.bfloat16()}, "must be torch.float8_e4m"),
        ("sparse_attention", {"value_buffer": lambda x: x[:, :, :3]}, r"float32 \[3, 2, 3\]"),
    ],
)
def test_what_is_in_fp8_comes_with_its_scales(name: str, change: dict, words: str) -> None:
    arguments = cases.ARGUMENTS[name](Sizes(fp8=True, device="cpu"))
    for key, alter in change.items():
        arguments[key] = alter(arguments[key])
    with pytest.raises(ValueError, match=words):
        getattr(ops, name)(**arguments)


@pytest.mark.parametrize("name", ["fetch_values", "select_chunks", "sparse_attention"])
def test_opcheck(name: str) -> None:
    """But for the check of the schema, which compares tensors by what torch lacks in fp8."""
    arguments = cases.ARGUMENTS[name](Sizes(fp8=True, device="cpu", poison=False))
    if name == "fetch_values":
        arguments["buffer"].view(torch.uint8).zero_()
        arguments["buffer_scales"].zero_()
    op = getattr(torch.ops.shadowkv, name).default
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, tuple(arguments.values()), test_utils=checks)


# ---- the store ----

SHAPE = ModelShape(2, 4, 2, 16, 4)


def filled(specs: list[MethodSpec], tokens: int, dtype: torch.dtype) -> tuple[PromptStore, Tensor]:
    """A store of two prompts, the second taken in, and the values of its layers [L, Hk, S, D]."""
    store = PromptStore(
        SHAPE, specs, num_prompts=2, prompt_tokens=tokens + 20, new_tokens=8, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    total = store.prompt_tokens + 8
    table = torch.ones(1, total, 16, dtype=dtype)
    store.tables = RotaryTables(
        table, torch.zeros_like(table), torch.zeros(2, dtype=torch.int32), False
    )
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, tokens, 16, generator=g).to(dtype)
    for layer in range(2):
        store.add_layer(layer, Prompt(1, tokens, "x"), k[layer], v[layer])
    return store, v


@pytest.mark.parametrize("tokens", [5, 96, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_store_keeps_every_form_that_is_wanted(tokens: int, dtype: torch.dtype) -> None:
    """Cells of a sweep with other dtypes, chunks and placements beside each other."""
    specs = [
        *build_specs(["full"], {}),
        spec_of(),
        spec_of(value_placement="host"),
        spec_of(value_dtype="fp8"),
        spec_of(value_dtype="fp8", value_placement="host"),
        spec_of(value_dtype="fp8", chunk_size=16, landmark_dtype="fp8"),
        spec_of(landmark_dtype="fp8", landmarks_per_chunk=2),
    ]
    store, v = filled(specs, tokens, dtype)
    for layer in range(2):
        for form in (ValueForm("device"), ValueForm("host")):
            chunks, scales = store.value_store.chunked(layer, 8, form)
            assert scales is None
            assert torch.equal(chunks[1].flatten(1, 2)[:, :tokens], v[layer])
        for placement, size in (("device", 8), ("host", 8), ("device", 16)):
            count = tokens // size
            form = ValueForm(placement, "fp8", size)
            chunks, scales = store.value_store.chunked(layer, size, form)
            assert chunks.dtype == FP8
            assert chunks.shape[2] == scales.shape[2] == store.prompt_tokens // size
            whole = v[layer][:, : count * size].unflatten(1, (count, size))
            rounded, expected = quantise(whole, 2)
            assert torch.equal(scales[1, :, :count], expected), form
            assert torch.equal(chunks[1, :, :count].float(), rounded.float()), form
    assert len(store.value_store.held) == 5, "no form twice"


def test_landmarks_in_fp8_are_those_of_the_model_rounded() -> None:
    cells = [spec_of(landmark_dtype=dtype, landmarks_per_chunk=2) for dtype in ("model", "fp8")]
    store, _ = filled(cells, 99, torch.bfloat16)
    exact, rounded = (store.landmarks[(8, 2, dtype)] for dtype in ("model", "fp8"))
    for layer in range(2):
        here = (1, slice(None), slice(99 // 8))
        expected, scales = quantise(exact[layer][here], 1)
        assert torch.equal(rounded[layer][here].float(), expected.float())
        assert torch.equal(store.landmark_scales[(8, 2, "fp8")][layer][here], scales)


@pytest.mark.parametrize("chunk_size", [4, 8])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_bytes_are_those_of_8_bits_and_scales(chunk_size: int, placement: str) -> None:
    shape, tokens = ModelShape(3, 8, 2, 64, 2), 4096
    fields = {"chunk_size": chunk_size, "value_placement": placement}
    plain = spec_of(**fields).cache_bytes(shape, tokens, 100)
    values = spec_of(**fields, value_dtype="fp8").cache_bytes(shape, tokens, 100)
    chunks = tokens // chunk_size + spec_of(**fields).keeps(tokens).selected_chunks  # and slots
    saved = 3 * chunks * 2 * (chunk_size * 64 - 4)  # a scale a chunk and head
    assert plain.device + plain.host - values.device - values.host == saved
    assert values.host == plain.host / 2
    landmarks = spec_of(**fields, landmark_dtype="fp8").cache_bytes(shape, tokens, 100)
    assert landmarks.host == plain.host
    assert plain.device - landmarks.device == 3 * (tokens // chunk_size) * 2 * (64 - 4)


def test_bytes_of_cells_together_are_what_the_store_holds() -> None:
    """Each form once; rounding up to a chunk adds nothing at a whole number of them."""
    specs = [
        *build_specs(["full"], {}),
        spec_of(),
        spec_of(value_dtype="fp8", value_placement="host"),
        spec_of(value_dtype="fp8", value_placement="host", rank=8),
        spec_of(value_dtype="fp8", landmark_dtype="fp8"),
    ]
    store, _ = filled(specs, 4076, torch.float32)
    assert store.prompt_tokens == 4096
    own = 0  # outliers, local and generated tokens, and slots
    for spec in specs[1:]:
        assert isinstance(spec, ShadowKVSpec)
        form = spec.value_forms(2)[0]
        own += shared_cache_bytes([spec], SHAPE, 4096, 8).device
        own -= 2 * form.data_bytes(SHAPE, 4096) * (form.placement == "device")
        own -= 2 * form.scale_bytes(SHAPE, 4096)
        own -= 2 * spec.landmark_bytes(SHAPE, 4096)
        own -= 2 * spec.rank * (4096 + 32) * 4
    counted = shared_cache_bytes(specs, SHAPE, 4096, 8)

    def held(*tensors: Tensor) -> int:
        return sum(t.nbytes for t in tensors) // 2  # of one prompt

    values = store.value_store
    on_host = [
        t for form, layers in values.held.items() for t in layers.values()
        if form.placement == "host"
    ]  # fmt: skip
    beside = [
        t for form, layers in values.held.items() for t in layers.values()
        if form.placement == "device"
    ]  # fmt: skip
    beside += [t for layers in values.scales.values() for t in layers.values()]
    beside += [*store.keys, *store.coefficients, *store.basis]
    beside += [t for layers in store.landmarks.values() for t in layers]
    beside += [t for layers in store.landmark_scales.values() for t in layers]
    assert counted.host == held(*on_host)
    assert counted.device == held(*beside) + own


# ---- decoding ----


def prefilled(*specs: MethodSpec, tokens: int = 403, dtype: torch.dtype = torch.float32) -> Session:
    session = Session(
        tiny_model("llama", dtype=dtype), list(specs), prompt_tokens=tokens, new_tokens=12
    )
    g = torch.Generator().manual_seed(1)
    session.prefill(torch.randint(3, 256, (tokens,), generator=g).tolist(), key="a")
    return session


def logits_of(session: Session, steps: int = 12) -> Tensor:
    """Of given tokens, [steps, R, V]."""
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 256, (steps,), generator=g)
    return torch.stack([session.decode_step(t.expand(len(session.specs))) for t in tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_from_fp8_values_is_decoding_from_what_they_stand_for(dtype: torch.dtype) -> None:
    """Equal to the bit; outliers, local and generated tokens stay as the model has them."""
    rounded, plain = (
        prefilled(spec_of(value_dtype=kept_in, value_buffer=2), dtype=dtype)
        for kept_in in ("fp8", "model")
    )
    exact = logits_of(plain)
    plain.reset()
    for layer in range(2):
        chunks, scales = rounded.store.value_store.chunked(layer, 8, ValueForm("device", "fp8", 8))
        held = plain.store.values[layer][:, :, : rounded.store.prompt_tokens]
        held.copy_(dequantise(chunks, scales).flatten(2, 3))
    found = logits_of(rounded)
    assert torch.equal(found, logits_of(plain))
    assert not torch.equal(found, exact)
    assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_decoding_by_fp8_landmarks_is_decoding_by_what_they_stand_for() -> None:
    rounded, plain = (
        prefilled(spec_of(landmark_dtype=kept_in, landmarks_per_chunk=2))
        for kept_in in ("fp8", "model")
    )
    exact = logits_of(plain)
    plain.reset()
    form = (8, 2, "fp8")
    for layer in range(2):
        wide = dequantise(
            rounded.store.landmarks[form][layer], rounded.store.landmark_scales[form][layer]
        )
        plain.store.landmarks[(8, 2, "model")][layer].copy_(wide)
    found = logits_of(rounded)
    assert torch.equal(found, logits_of(plain))
    assert not torch.equal(found, exact), "another selection somewhere"


def test_cells_that_differ_in_dtypes_decode_beside_each_other() -> None:
    """Each as if it were alone, host memory and chunk sizes included."""
    cells = [
        *build_specs(["full", "oracle"], {"sparse_budget": "64"}),
        spec_of(),
        spec_of(value_dtype="fp8"),
        spec_of(value_dtype="fp8", value_placement="host"),
        spec_of(value_dtype="fp8", landmark_dtype="fp8", chunk_size=4),
        spec_of(landmark_dtype="fp8"),
    ]
    together = logits_of(prefilled(*cells))
    for row, spec in enumerate(cells):
        alone = logits_of(prefilled(spec))[:, 0]
        assert torch.allclose(together[:, row], alone, atol=1e-4), spec.cell
    torch.testing.assert_close(together[:, 3], together[:, 4], atol=1e-4, rtol=0)
    differ = [float((together[:, 2] - together[:, row]).abs().max()) for row in (3, 5, 6)]
    assert min(differ) > 1e-3, differ


# ---- the command line ----


def test_eval_of_the_demo_model_scores_as_without_fp8(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    build = "build-data ruler --tokenizer demo --context-length 1k --num-samples 6 --seed 5"
    tasks = "niah_single_2,niah_multikey_1"
    assert run([*build.split(), "--tasks", tasks, "--output", str(data)]) == 0
    command = ["eval", "--model", "demo", "--device", "cpu", "--data", str(data)]
    command += ["--method", "shadowkv", "--sparse-budget", "128", "--rank", "128"]
    command += ["--value-dtype", "model,fp8", "--landmark-dtype", "model,fp8"]
    assert run([*command, "--output", str(out)]) == 0
    rows = read_run(out).predictions
    scores: dict[tuple[str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        kept = (row["settings"]["value_dtype"], row["settings"]["landmark_dtype"])
        scores.setdefault(kept, []).append(row["score"])
    assert set(scores) == set(itertools.product(("model", "fp8"), repeat=2))
    exact = scores[("model", "model")]
    assert sum(exact) / len(exact) > 0.8, scores
    for kept, own in scores.items():
        difference = paired_difference(own, exact)
        assert difference.high >= 0, (kept, difference)
        assert sum(own) >= sum(exact) - 2, (kept, own, exact)
    held = {row["cell"]: row["gpu_bytes"] for row in rows if row["id"] == rows[0]["id"]}
    assert len(set(held.values())) == 4, held


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--value-dtype", "bf16"],
            "value_dtype of shadowkv must be model or packed or fp8, not 'bf16'",
        ),
        (["--landmark-dtype", "int8"], "landmark_dtype of shadowkv must be model or packed or fp8"),
        (["--method", "full,oracle", "--value-dtype", "fp8"], "--value-dtype has no effect"),
    ],
)
def test_what_is_refused(more: list[str], says: str, tmp_path: Path, capsys) -> None:
    command = ["bench", "--model", "demo", "--context-length", "1k", "--output", str(tmp_path)]
    assert run([*command, *more]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1, error
