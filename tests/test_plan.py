"""The planner: its bytes are those that are counted, its milliseconds those that were measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.bench.plan import LAUNCH_US, memory_items, phase_bytes, phase_ms
from shadowkv_cli.bench.probes import Probe
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import MethodSpec, ModelShape

LLAMA = ModelShape(32, 32, 8, 128, 2)
WEIGHTS = 16_060_522_496
RESULTS = Path(__file__).parents[1] / "results"


@given(
    tokens=st.integers(40, 9000),
    new=st.integers(1, 300),
    batch=st.integers(1, 40),
    budget=st.integers(1, 200),
    chunk=st.sampled_from([2, 4, 8, 16]),
    rank=st.integers(1, 400),
    buffers=st.tuples(st.floats(1, 8), st.floats(1, 8)),
    landmarks=st.sampled_from([1, 2]),
    dtypes=st.tuples(
        st.sampled_from(["model", "packed", "fp8"]), st.sampled_from(["model", "packed", "fp8"])
    ),
    resident=st.one_of(st.none(), st.integers(0, 32)),
)
def test_items_add_up_to_what_a_cache_holds(
    tokens, new, batch, budget, chunk, rank, buffers, landmarks, dtypes, resident
) -> None:
    settings = {
        "sparse_budget": str(budget * chunk),
        "chunk_size": str(chunk),
        "rank": str(rank),
        "landmarks_per_chunk": str(landmarks),
        "value_buffer": str(buffers[0]),
        "key_buffer": str(buffers[1]),
        "value_dtype": dtypes[0],
        "landmark_dtype": dtypes[1],
        "value_placement": "device" if resident is None else "host",
        "resident_layers": str(resident or 0),
    }
    for spec in build_specs(["full", "shadowkv", "streaming"], settings):
        items = memory_items(spec, LLAMA, tokens, new, batch)
        held = spec.cache_bytes(LLAMA, tokens, new)
        assert sum(item.device for item in items) == batch * held.device, spec.cell
        assert sum(item.host for item in items) == batch * held.host, spec.cell


@dataclass(frozen=True)
class Measured:
    """A cell of a committed run, at one batch."""

    probe: Probe
    rows: list[dict]

    @property
    def step_ms(self) -> float:
        return median(row["step_ms_p50"] for row in self.rows)

    def foretold(self, spec: MethodSpec, micro_batches: int | None = None) -> float:
        first = self.rows[0]
        return phase_ms(
            spec,
            LLAMA,
            WEIGHTS,
            self.probe,
            first["prompt_tokens"],
            first["batch_size"],
            hit_rate=first["hit_rate"] or 0.0,
            lanes=first["lanes"],
            micro_batches=micro_batches or first.get("micro_batches", 1),
        )["step"]


def cells_of(run: Path) -> list[Measured]:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    probe = Probe(**manifest["environment"]["probe"])
    found: dict[tuple[str, int], list[dict]] = {}
    for line in (run / "throughput.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        # Transformers' own forward is not foretold.
        if row["error"] is None and row["method"] != "eager-sdpa":
            found.setdefault((row["cell"], row["batch_size"]), []).append(row)
    return [Measured(probe, rows) for rows in found.values()]


def spec_of(row: dict) -> MethodSpec:
    """The method that a row was measured with, with as many resident layers as it had."""
    cell = row["spec"].replace("=auto", f"={row['resident_layers']}")
    [spec] = build_specs([cell], {})
    return spec


@pytest.mark.parametrize(
    ("run", "cells", "within"),
    [
        ("h100-decode", 3, 0.08),
        ("h100-decode-fp8", 6, 0.08),
        ("h100-decode-packed", 3, 0.08),
        ("h200-decode", 5, 0.08),
        ("h200-decode-61440", 3, 0.08),
        ("h100-decode-batch-1", 3, 0.08),
        ("h100-decode-245760", 2, 0.08),
        ("h100-decode-61440", 2, 0.1),
        ("h100-levers", 24, 0.16),  # two micro-batches where they do not pay, 88 % of hits
    ],
)
def test_steps_are_foretold_as_the_reference_runs_measured_them(
    run: str, cells: int, within: float
) -> None:
    measured = [cell for cell in cells_of(RESULTS / run) if cell.rows[0]["captured"]]
    assert len(measured) == cells
    for cell in measured:
        found = cell.foretold(spec_of(cell.rows[0]))
        assert found == pytest.approx(cell.step_ms, rel=within), cell.rows[0]["cell"]


def test_two_micro_batches_are_foretold_to_be_faster_where_they_were_measured() -> None:
    [cell] = [c for c in cells_of(RESULTS / "h100-decode") if c.rows[0]["micro_batches"] == 2]
    spec = spec_of(cell.rows[0])
    assert cell.foretold(spec, 2) < cell.foretold(spec, 1), "which is why it was measured with two"


def test_bytes_of_phases_are_those_of_the_items_that_a_step_reads() -> None:
    settings = {"sparse_budget": "2048", "outlier_chunks": "48", "value_placement": "host"}
    full, ours = build_specs(["full", "shadowkv"], settings)
    batch, tokens = 14, 122_880
    found = phase_bytes(ours, LLAMA, WEIGHTS, tokens, batch, hit_rate=0.75)
    items = {item.name: item for item in memory_items(ours, LLAMA, tokens, 0, batch)}
    assert found["dense"] == WEIGHTS
    assert found["select"] == items["landmarks"].device
    assert found["fetch"] == items["value buffer"].device / 4
    kept = ours.keeps(tokens)
    assert found["attention"] == batch * LLAMA.kv_bytes(kept.tokens)
    a_token = 32 * 14 * 8 * 2 * (160 + 2 * 128)  # coefficients read, keys written and read again
    assert found["rebuild"] == 2048 / 4 * a_token
    assert phase_bytes(full, LLAMA, WEIGHTS, tokens, 4, hit_rate=0.0) == {
        "dense": WEIGHTS,
        "attention": 4 * LLAMA.kv_bytes(tokens),
    }


def test_less_to_fetch_and_more_lanes_are_never_slower() -> None:
    (spec,) = build_specs(["shadowkv"], {"value_placement": "host", "sparse_budget": "2048"})
    probe = Probe("x", 3000.0, {}, 54.0, 54.0, 50.0, "", "2026-11-24")

    def step(hits: float, lanes: int) -> float:
        found = phase_ms(spec, LLAMA, WEIGHTS, probe, 122_880, 14, hit_rate=hits, lanes=lanes)
        return found["step"]

    steps = [step(hits / 10, 2) for hits in range(11)]
    assert steps == sorted(steps, reverse=True)
    assert step(0.6, 2) < step(0.6, 1)


def test_micro_batches_pay_where_fetching_takes_longest() -> None:
    settings = {"value_placement": "host", "sparse_budget": "2048", "outlier_chunks": "48"}
    (spec,) = build_specs(["shadowkv:value_buffer=4,key_buffer=4"], settings)
    probe = Probe("x", 3100.0, {}, 54.6, 54.6, 47.2, "", "2026-11-24")

    def phases(hits: float, micro_batches: int) -> dict[str, float]:
        return phase_ms(
            spec,
            LLAMA,
            WEIGHTS,
            probe,
            122_880,
            16,
            hit_rate=hits,
            lanes=4 // micro_batches,
            micro_batches=micro_batches,
        )

    for hits, pays in ((0.0, True), (0.59, True), (0.88, False), (1.0, False)):
        one, two = phases(hits, 1), phases(hits, 2)
        assert (two["step"] < one["step"]) is pays, hits
        assert one["dense"] < two["dense"] < 2 * one["dense"], "weights are read twice"
        for name in ("residency", "fetch", "rebuild"):
            assert two[name] == pytest.approx(one[name]), "as many launches, as many bytes"
        for name in ("select", "attention"):
            again = LLAMA.num_layers * LAUNCH_US[name] / 1e3
            assert two[name] == pytest.approx(one[name] + again), "all lanes together"
    assert phases(0.0, 2)["step"] > phases(0.0, 2)["fetch"]
    once, twice = (
        phase_bytes(spec, LLAMA, WEIGHTS, 122_880, 16, hit_rate=0.5, micro_batches=count)
        for count in (1, 2)
    )
    assert twice == once | {"dense": 2 * WEIGHTS}


def test_bench_plan_runs_nothing(tmp_path: Path, tiny_model_folder: Path, capsys) -> None:
    out = tmp_path / "b"
    command = ["bench", "--model", str(tiny_model_folder), "--context-length", "512,1k", "--rank"]
    command += ["8", "--sparse-budget", "32", "--value-placement", "host", "--batch-size", "2"]
    assert run([*command, "--plan", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "landmarks" in text
    assert "pinned host memory: values" in text
    assert "for a GPU only" in text
    assert run([*command, "--plan", "--json", "--output", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["context_length"] for row in found["batches"]] == [512, 512, 1024, 1024]
    assert found["batches"][1]["host_bytes"]["values"] > 0
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "full", "--hit-rate", "0.5"], "--hit-rate drives what shadowkv selects"),
        (["--hit-rate", "1.5"], "--hit-rate must lie between 0 and 1, not be 1.5"),
        (["--hit-rate", "often"], "--hit-rate 'often' is no share"),
        (["--lanes", "2"], "--lanes overlap fetches from the host"),
        (["--lanes", "0", "--value-placement", "host"], "--lanes must be at least 1"),
        (["--plan", "--dry-run"], "leave one of them out"),
        (["--model", "shape:nothing"], "llama-3.1-8b"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    more: list[str], says: str, tmp_path: Path, tiny_model_folder: Path, capsys
) -> None:
    command = ["bench", "--model", str(tiny_model_folder), "--state", "synthetic"]
    command += ["--context-length", "512", "--output", str(tmp_path / "b"), *more]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "b").exists()


def test_a_shape_has_no_tokenizer_to_build_data_with(tmp_path: Path, capsys) -> None:
    command = ["build-data", "ruler", "--tokenizer", "shape:llama-3.1-8b", "--context-length", "1k"]
    assert run([*command, "--output", str(tmp_path / "d")]) == 2
    assert "no tokenizer of its own" in capsys.readouterr().err


def test_other_lanes_are_cells_of_their_own(tmp_path: Path, tiny_model_folder: Path) -> None:
    command = ["bench", "--model", str(tiny_model_folder), "--state", "synthetic", "--rank", "8"]
    command += ["--context-length", "512", "--decode-steps", "2", "--rounds", "1"]
    command += ["--sparse-budget", "32", "--value-placement", "host", "--batch-size", "4"]
    command += ["--method", "shadowkv", "--output", str(tmp_path / "b")]
    assert run(command) == 0
    assert run([*command, "--lanes", "2"]) == 0
    lines = (tmp_path / "b" / "throughput.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(row["lanes"], row["cell"].endswith("(2 lanes)")) for row in map(json.loads, lines)]
    assert found == [(1, False), (2, True)]
