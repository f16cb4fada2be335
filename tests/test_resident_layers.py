"""Values of some layers on the device though the others' are on the host: where, and how many."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.bench import cases
from shadowkv_cli.bench.cases import Room, make_cases
from shadowkv_cli.bench.plan import phase_ms
from shadowkv_cli.bench.probes import Probe
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import MethodSpec, ModelShape, ShadowKVSpec, ValueForm
from shadowkv_cli.methods import PromptStore
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.run_config import BenchSettings
from shadowkv_cli.shared_bytes import shared_cache_bytes
from shadowkv_cli.testing import tiny_model

LLAMA = ModelShape(32, 32, 8, 128, 2)
SETTINGS = {"rank": "16", "sparse_budget": "64", "value_placement": "host"}


def spec_of(resident: int | str, **fields: object) -> ShadowKVSpec:
    own = SETTINGS | {"resident_layers": str(resident)} | {k: str(v) for k, v in fields.items()}
    [spec] = build_specs(["shadowkv"], own)
    assert isinstance(spec, ShadowKVSpec)
    return spec


# ---- which layers ----


@given(st.integers(1, 90), st.data())
def test_resident_layers_are_spread_evenly(layers: int, data: st.DataObject) -> None:
    resident = data.draw(st.integers(0, layers))
    forms = spec_of(resident).value_forms(layers)
    there = [layer for layer, form in enumerate(forms) if form.placement == "device"]
    assert len(forms) == layers
    assert len(there) == resident
    gaps = {after - before for before, after in itertools.pairwise(there)}
    assert not gaps or max(gaps) - min(gaps) <= 1, there


def test_half_of_the_layers_alternate() -> None:
    forms = spec_of(2, value_dtype="fp8").value_forms(4)
    host, device = ValueForm("host", "fp8", 8), ValueForm("device", "fp8", 8)
    assert forms == [host, device, host, device]


# ---- the store ----


def store_of(specs: list[MethodSpec], layers: int) -> PromptStore:
    return PromptStore(
        ModelShape(layers, 4, 2, 16, 4), specs, num_prompts=3, prompt_tokens=160, new_tokens=8,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("resident", range(6))
@pytest.mark.parametrize("kept_in", ["model", "packed", "fp8"])
def test_bytes_are_where_the_layers_are(resident: int, kept_in: str) -> None:
    spec, shape = spec_of(resident, value_dtype=kept_in), ModelShape(5, 4, 2, 16, 4)
    held = store_of([spec], 5).value_store.held
    size = 8 if kept_in == "fp8" else None
    on = {
        place: held.get(ValueForm(place, kept_in, size), {})  # type: ignore[arg-type]
        for place in ("device", "host")
    }
    assert sorted([*on["device"], *on["host"]]) == list(range(5)), "each layer once"
    assert len(on["device"]) == resident
    counted, none = (s.cache_bytes(shape, 160, 8) for s in (spec, spec_of(0, value_dtype=kept_in)))
    assert counted.host * 3 == sum(t.nbytes for t in on["host"].values())
    assert (counted.device - none.device) * 3 == sum(t.nbytes for t in on["device"].values())
    assert counted.device + counted.host == none.device + none.host


def test_cells_share_the_layers_that_both_have_there() -> None:
    """Two and three of five resident layers, beside full attention and alone."""
    shape, cells = ModelShape(5, 4, 2, 16, 4), [spec_of(2), spec_of(3)]
    beside = {
        i for spec in cells for i, form in enumerate(spec.value_forms(5))
        if form.placement == "device"
    }  # fmt: skip
    on_host = {
        i for spec in cells for i, form in enumerate(spec.value_forms(5))
        if form.placement == "host"
    }  # fmt: skip
    held = store_of(list(cells), 5).value_store.held
    assert set(held[ValueForm("device")]) == beside
    assert set(held[ValueForm("host")]) == on_host
    counted = shared_cache_bytes(cells, shape, 160, 8)
    assert counted.host == len(on_host) * 160 * 32 * 4
    full = build_specs(["full"], {})
    together = shared_cache_bytes([*full, *cells], shape, 160, 8)
    own = counted.device - len(beside) * 160 * 32 * 4
    assert together.device == own + full[0].cache_bytes(shape, 160, 8).device
    assert together.host == counted.host
    exact = store_of([*full, *cells], 5).values
    assert {tensor.shape[2] for tensor in exact.values()} == {168}
    assert set(exact) == set(range(5))


# ---- decoding ----


@pytest.mark.parametrize("kept_in", ["model", "fp8"])
def test_placement_changes_no_bit(kept_in: str) -> None:
    fields = {"value_dtype": kept_in, "landmark_dtype": kept_in, "value_buffer": 2}
    cells = [spec_of(n, **fields) for n in range(3)]
    cells.append(spec_of(0, **fields, value_placement="device"))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 256, (403,), generator=generator).tolist()
    found = []
    for specs in (*([cell] for cell in cells), cells):
        session = Session(tiny_model("llama"), specs, prompt_tokens=403, new_tokens=12)
        session.prefill(ids, key="a")
        tokens = torch.randint(3, 256, (12,), generator=torch.Generator().manual_seed(2))
        steps = [session.decode_step(token.expand(len(specs))) for token in tokens]
        found.append(torch.stack(steps))
    for logits in found[1:4]:
        assert torch.equal(logits, found[0])
    for row in range(1, 4):
        assert torch.equal(found[4][:, row], found[4][:, 0])
    assert torch.allclose(found[4][:, :1], found[0], atol=1e-4)


# ---- as many as fit ----

TOKENS = 122_880
BENCH = BenchSettings((TOKENS,), ("auto",), decode_steps=56, warmup_steps=8)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> tuple[Room, dict[str, int]]:
    """A GPU of so many bytes beside a host of so many; no such device is needed."""
    free = {"device": 60 * 10**9, "host": 110 * 10**9}
    monkeypatch.setattr(cases, "free_device_bytes", lambda *_: free["device"])
    monkeypatch.setattr(cases, "free_host_bytes", lambda: free["host"])
    return Room(LLAMA, torch.device("cuda")), free


@pytest.mark.parametrize("device_gb", [3, 20, 60, 130, 400])
@pytest.mark.parametrize("host_gb", [4, 40, 110, 600])
@pytest.mark.parametrize("kept_in", ["model", "packed", "fp8"])
def test_auto_is_the_largest_batch_then_the_most_layers(
    room: tuple[Room, dict[str, int]], device_gb: int, host_gb: int, kept_in: str
) -> None:
    """By brute force over batches and layers."""
    place, free = room
    free |= {"device": device_gb * 10**9, "host": host_gb * 10**9}
    asked = spec_of("auto", rank=160, sparse_budget=2048, value_dtype=kept_in)
    fitting = []
    for layers in range(33):
        spec = spec_of(layers, rank=160, sparse_budget=2048, value_dtype=kept_in)
        held = spec.cache_bytes(LLAMA, BENCH.prompt_tokens(TOKENS), BENCH.new_tokens)
        batch = free["device"] // held.device
        if held.host:
            batch = min(batch, free["host"] // held.host)
        fitting += [(b, layers) for b in range(1, batch + 1)]
    case = (device_gb, host_gb, kept_in)
    if not fitting:
        assert place.largest_batch(asked, BENCH.prompt_tokens(TOKENS), BENCH) < 1, case
        return
    [found] = make_cases([asked], BENCH, place)
    assert (found.batch_size, found.resident_layers) == max(fitting), case
    assert found.cell == asked.cell


def test_a_batch_that_is_given_gets_as_many_layers_as_fit(room: tuple[Room, dict]) -> None:
    place, free = room
    settings = BenchSettings((TOKENS,), ("1", "14", "equal"), decode_steps=56, warmup_steps=8)
    found = make_cases([spec_of("auto")], settings, place)
    layers = [case.resident_layers for case in found]
    assert layers[0] == 32
    assert 0 < layers[1] < 32
    for case, count in zip(found, layers, strict=True):
        more = spec_of(min(count + 1, 32))
        tokens = BENCH.prompt_tokens(TOKENS)
        needed = more.cache_bytes(LLAMA, tokens, 64).device * case.batch_size
        assert count == 32 or needed > free["device"], case
    rates = BenchSettings((TOKENS,), ("auto",), hit_rates=(0.6, 0.88))
    one, other = make_cases([spec_of("auto")], rates, place)
    assert one.spec == other.spec, "both rates are driven in one session"


def test_a_run_that_goes_on_keeps_its_layers(room: tuple[Room, dict[str, int]]) -> None:
    """The memory that is free may have changed; rows of one cell are of one placement."""
    place, free = room
    asked = spec_of("auto", rank=160)
    [first] = make_cases([asked], BENCH, place)
    row = {
        "cell": first.cell,
        "spec": first.asked_spec.cell,
        "context_length": TOKENS,
        "batch_rule": "auto",
        "batch_size": first.batch_size,
        "resident_layers": first.resident_layers,
    }
    free["device"] *= 2
    [changed] = make_cases([asked], BENCH, place)
    assert changed != first
    [again] = make_cases([asked], BENCH, place, [row])
    assert again == first


def test_the_plan_fetches_resident_layers_at_the_speed_of_memory() -> None:
    probe = Probe("x", 3000.0, {}, 54.0, 54.0, 50.0, "", "2026-11-26")

    def phases(resident: int) -> dict[str, float]:
        spec = spec_of(resident, rank=160, sparse_budget=2048)
        return phase_ms(spec, LLAMA, 16 * 10**9, probe, TOKENS, 14, hit_rate=0.6, lanes=2)

    fetches = [phases(n)["fetch"] for n in range(0, 33, 4)]
    steps = [phases(n)["step"] for n in range(0, 33, 4)]
    assert fetches == sorted(fetches, reverse=True)
    assert steps == sorted(steps, reverse=True)
    assert fetches[4] == pytest.approx((fetches[0] + fetches[8]) / 2)
    assert fetches[0] > 10 * fetches[8]


# ---- the command line ----


def test_bench_measures_and_resumes_auto(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    command = ["bench", "--model", str(tiny_model_folder), "--state", "synthetic", "--rank", "8"]
    command += ["--context-length", "512", "--decode-steps", "2", "--sparse-budget", "32"]
    command += ["--method", "full,shadowkv", "--value-placement", "host", "--batch-size", "2"]
    command += ["--resident-layers", "1,auto", "--value-dtype", "fp8", "--output", str(out)]
    assert run([*command, "--plan", "--json"]) == 0
    full, one, auto = json.loads(capsys.readouterr().out)["batches"]
    assert [full["resident_layers"], one["resident_layers"]] == [None, 1]
    assert auto["resident_layers"] == 0, "a CPU has one memory"
    assert one["device_bytes"]["values"] == one["host_bytes"]["values"]
    assert "values" not in auto["device_bytes"]
    assert auto["host_bytes"]["values"] == 2 * one["host_bytes"]["values"]
    assert run([*command, "--rounds", "1"]) == 0
    assert run([*command, "--rounds", "2"]) == 0
    rows = read_run(out).throughput
    assert len(rows) == 6
    assert all(row["error"] is None for row in rows)
    by_cell = {row["cell"]: row["resident_layers"] for row in rows}
    assert len(by_cell) == 3
    assert next(v for k, v in by_cell.items() if "resident_layers=1" in k) == 1
    assert next(v for k, v in by_cell.items() if "resident_layers=auto" in k) == 0


@pytest.mark.parametrize(
    ("command", "more", "says"),
    [
        ("bench", ["--resident-layers", "2"], "resident_layers 2 has no effect"),
        ("bench", ["--resident-layers", "auto"], "resident_layers auto has no effect"),
        ("bench", ["--value-placement", "host", "--resident-layers", "-1"], "at least 0, not -1"),
        ("bench", ["--value-placement", "host", "--resident-layers", "3"], "the model's 2 layers"),
        (
            "bench",
            ["--value-placement", "host", "--resident-layers", "x"],
            "a whole number or auto",
        ),
        (
            "bench",
            ["--method", "full", "--resident-layers", "1"],
            "--resident-layers has no effect",
        ),
        ("eval", ["--value-placement", "host", "--resident-layers", "auto"], "auto is for bench"),
        ("sweep", ["--value-placement", "host", "--resident-layers", "auto"], "auto is for bench"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    command: str, more: list[str], says: str, tmp_path: Path, tiny_model_folder: Path,
    ruler_folder: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [command, "--model", str(tiny_model_folder), "--output", str(tmp_path / "x"), *more]
    given += [] if "--method" in more else ["--rank", "8"]
    given += ["--context-length", "512"] if command == "bench" else ["--data", str(ruler_folder)]
    assert run(given) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "x").exists()
