"""The ways that a benchmark decodes a cell in: hit rates, lanes, with and without a graph."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shadowkv_cli.bench import cases, memory, throughput
from shadowkv_cli.bench.cases import (
    MOST_LANES,
    MOST_LANES_OF_SEVERAL,
    MOST_LANES_OF_TWO_TABLES,
    Room,
    cases_at,
    make_cases,
)
from shadowkv_cli.bench.probes import Probe
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.config import FullSpec, ModelShape
from shadowkv_cli.results import read_run
from shadowkv_cli.run_config import BenchSettings

LLAMA = ModelShape(32, 32, 8, 128, 2)
ON_HOST = {"value_placement": "host", "sparse_budget": "2048", "outlier_chunks": "48"}
SPECS = build_specs(["full", "shadowkv", "shadowkv:value_buffer=4,key_buffer=4"], ON_HOST)


def settings_of(**changes: Any) -> BenchSettings:
    return BenchSettings(context_lengths=(122_880,), **changes)


def cells(batch: int, **changes: Any) -> list[str]:
    sizes = dict.fromkeys([*SPECS, FullSpec()], batch)
    found = cases_at(122_880, str(batch), SPECS, settings_of(**changes), sizes)
    return [case.cell.partition(" (")[2].rstrip(")") for case in found]


def test_every_combination_or_one_at_a_time() -> None:
    assert cells(8) == ["", "", ""]
    assert cells(8, lanes=(1, 2)) == ["", *("1 lane", "2 lanes") * 2]
    both = {"lanes": (2, 1), "graphs": (True, False), "hit_rates": (0.59,)}
    ours = ["2 lanes", "2 lanes; no graph", "1 lane", "1 lane; no graph"]
    driven = [f"hits driven to 59%; {words}" for words in ours]
    assert cells(8, **both) == ["", "no graph", *driven, *driven]
    star = [driven[0], driven[1], driven[2]]
    assert cells(8, **both, one_at_a_time=True) == ["", "no graph", *star, driven[0]]


def test_micro_batches_are_ways_too() -> None:
    assert cells(8, micro_batches=(1, 2)) == ["", *("1 micro-batch", "2 micro-batches") * 2]
    both = {"lanes": (2, 1), "micro_batches": (2, 1)}
    ours = [f"2 micro-batches; {lanes}" for lanes in ("2 lanes", "1 lane")]
    others = [f"1 micro-batch; {lanes}" for lanes in ("2 lanes", "1 lane")]
    assert cells(8, **both) == ["", *(ours + others) * 2]
    assert cells(8, **both, one_at_a_time=True) == ["", *ours, others[0], ours[0]]
    many = cells(3, micro_batches=(1, 2, 3, 8), lanes=(4,))
    assert many[1:5] == [
        "1 micro-batch; 3 lanes",
        "2 micro-batches; 2 lanes",
        "3 micro-batches; 1 lane",
        "1 micro-batch; 3 lanes",
    ], "no more parts than there are sequences"


@pytest.mark.parametrize(
    ("buffers", "batch", "found"),
    [
        ((4, 4), 16, [(1, 16), (2, 8), (8, 2)]),
        ((4, 4), 31, [(1, 31), (2, 8), (8, 4)]),
        ((4, 4), 33, [(1, 17), (2, 6), (8, 5)]),  # lanes of 2, of 3
        ((4, 4), 1, [(1, 1)]),
        ((4, 2), 16, [(1, 8), (2, 8), (8, 2)]),
        ((4, 2), 27, [(1, 14), (2, 7), (8, 4)]),
        ((4, 2), 33, [(1, 11), (2, 6), (8, 5)]),  # lanes of 3
        ((4, 2), 1, [(1, 1)]),
        ((4, 4), 0, [(1, 1)]),  # a batch that does not fit, which is refused later
    ],
)
def test_usual_lanes_have_one_row_or_two_where_keys_have_their_own_table(
    buffers, batch, found
) -> None:
    values, keys = buffers
    specs = build_specs([f"shadowkv:value_buffer={values},key_buffer={keys}"], ON_HOST)
    sizes = dict.fromkeys([*specs, FullSpec()], batch)
    settings = settings_of(micro_batches=(1, 2, 8))
    ways = cases_at(122_880, str(batch), specs, settings, sizes)
    assert [(case.micro_batches, case.lanes) for case in ways] == found


def test_where_nothing_fits_the_planner_is_not_asked_in_vain(h100: Room, monkeypatch) -> None:
    from shadowkv_cli.errors import UsageError

    monkeypatch.setattr(cases, "free_device_bytes", lambda device, reserve, *_: 1_000_000_000)
    probe = Probe("x", 3100.0, {}, 54.6, 54.6, 47.2, "", "2026-11-24")
    room = replace(h100, weight_bytes=16_060_522_496, probe=probe)
    settings = settings_of(batch_rules=("auto",), state="synthetic", hit_rates=(0.88,))
    with pytest.raises(UsageError, match=r"for batch 1, 1\.0 GB are free"):
        make_cases(SPECS[2:], settings, room)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hit_rates": (0.59, 0.88)}, [(2, 7), (1, 14)]),
        ({"hit_rates": (None,)}, [(1, 14)]),
        ({"hit_rates": (0.59,), "lanes": (4,)}, [(1, 4)]),
        ({"hit_rates": (0.59,), "micro_batches": (1,)}, [(1, 14)]),
        ({"hit_rates": (0.59,), "graphs": (False,)}, [(1, 14)]),
        ({"hit_rates": (0.59,), "batch_rules": ("1",)}, [(1, 1)]),
    ],
)
def test_micro_batches_are_taken_where_the_planner_finds_them_faster(
    h100: Room, changes: dict[str, Any], found: list[tuple[int, int]]
) -> None:
    probe = Probe("x", 3100.0, {}, 54.6, 54.6, 47.2, "", "2026-11-24")
    room = replace(h100, weight_bytes=16_060_522_496, probe=probe)
    settings = settings_of(**{"batch_rules": ("14",), "state": "synthetic"} | changes)
    cases = make_cases(SPECS[2:], settings, room)
    assert [(case.micro_batches, case.lanes) for case in cases] == found
    assert not any("micro" in case.cell for case in cases if not case.micro_batches_asked)
    [first, *_] = cases
    row = {"cell": first.cell, "context_length": 122_880, "batch_rule": first.batch_rule}
    row |= {"spec": first.spec.cell, "batch_size": first.batch_size, "error": None, "lanes": 3}
    again = make_cases(SPECS[2:], settings, room, [row])[0]
    if settings.lanes:
        assert again == first
    else:
        assert (again.micro_batches, again.lanes) == (1, 3), "as the row that it goes on from"


def test_a_batch_has_no_more_lanes_than_sequences() -> None:
    assert cells(2, lanes=(1, 2, 4, 8)) == ["", *("1 lane", "2 lanes") * 2]
    assert cells(1, lanes=(2, 4)) == ["", "1 lane", "1 lane"]
    found = cases_at(122_880, "3", SPECS, settings_of(), dict.fromkeys([*SPECS, FullSpec()], 3))
    assert [case.lanes for case in found] == [1, 3, 3]


@pytest.fixture
def h100(monkeypatch) -> Room:
    """A machine with 64 GB beside the weights and 130 GB of host memory, which nobody asks."""
    monkeypatch.setattr(cases, "free_device_bytes", lambda device, reserve, *_: 64_900_000_000)
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 130_000_000_000)
    return Room(LLAMA, torch.device("cuda"))


def test_auto_fills_the_host_but_for_what_a_process_takes(h100: Room, monkeypatch) -> None:
    settings = settings_of(batch_rules=("auto",), state="synthetic", decode_steps=24)
    sizes = {case.spec: case.batch_size for case in make_cases(SPECS, settings, h100)}
    assert sizes == {SPECS[0]: 4, SPECS[1]: 15, SPECS[2]: 15}
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 126_000_000_000)
    assert make_cases(SPECS[1:], settings, h100)[0].batch_size == 14


def test_what_the_host_cannot_hold_is_refused_before_anything_is_held(h100: Room) -> None:
    from shadowkv_cli.errors import UsageError

    settings = settings_of(batch_rules=("17",), state="synthetic")
    with pytest.raises(
        UsageError, match=r"needs 136\.\d GB of host memory for batch 17, 124\.0 GB"
    ):
        make_cases(SPECS[1:], settings, h100)
    with pytest.raises(UsageError, match="full at 122880 tokens needs"):
        make_cases(SPECS[1:], settings_of(batch_rules=("5",), eager_baseline=True), h100)


def test_graphs_are_for_a_gpu(h100: Room) -> None:
    from shadowkv_cli.errors import UsageError

    settings = settings_of(graphs=(True, False))
    assert [case.graph for case in make_cases(SPECS[:1], settings, h100)] == [True, False]
    with pytest.raises(UsageError, match="--graph says how a GPU decodes"):
        make_cases(SPECS[:1], settings, Room(LLAMA, torch.device("cpu")))


def command(model: Path, output: Path, *more: str) -> list[str]:
    fast = ["--rank", "8", "--sparse-budget", "32", "--decode-steps", "4", "--warmup-steps", "2"]
    place = ["--context-length", "512", "--state", "synthetic", "--output", str(output)]
    return ["bench", "--model", str(model), *fast, *place, "--rounds", "2", *more]


def test_lanes_share_one_filled_session_and_one_drift(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    filled, searched = [], []
    fill, drive = throughput.fill_synthetic, measured_drive()
    monkeypatch.setattr(
        throughput, "fill_synthetic", lambda *given: filled.append(1) or fill(*given)
    )

    def count(session, first, wanted, warmup, steps, known):
        if known is None:
            searched.append(wanted)
        return drive(session, first, wanted, warmup, steps, known)

    monkeypatch.setattr("shadowkv_cli.bench.measure.drive", count)
    more = ["--value-placement", "host", "--lanes", "2,1", "--lanes", "4", "--batch-size", "4"]
    more += ["--hit-rate", "0.5,measured", "--method", "shadowkv", "--value-buffer", "1,2"]
    assert run(command(tiny_model_folder, tmp_path / "b", *more, "--share")) == 0
    assert filled == [1], "all cells of one length and batch read one filled state"
    assert searched == [0.5, 0.5], "once for each cell, whatever its lanes"
    rows = read_run(tmp_path / "b").throughput
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row["lanes"] for row in rows} == {1, 2, 4}
    assert len({row["cell"] for row in rows}) == 12


def measured_drive():
    from shadowkv_cli.bench import measure

    return measure.drive


def test_one_at_a_time_varies_settings_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    more = ["--value-placement", "host", "--value-buffer", "4,1,2", "--key-buffer", "4,2"]
    more += ["--lanes", "2,1", "--batch-size", "2", "--method", "shadowkv", "--one-at-a-time"]
    assert run(command(tiny_model_folder, tmp_path / "b", *more, "--share")) == 0
    rows = [row for row in read_run(tmp_path / "b").throughput if row["round"] == 0]
    found = [
        (row["settings"]["value_buffer"], row["settings"]["key_buffer"], row["lanes"])
        for row in rows
    ]
    assert found == [(4, 4, 2), (4, 4, 1), (1, 4, 2), (2, 4, 2), (4, 2, 2)]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--graph", "off"], "--graph says how a GPU decodes"),
        (["--graph", "maybe"], "--graph must be on or off, not 'maybe'"),
        (["--lanes", "two"], "--lanes 'two' is no number of lanes"),
        (["--lanes", "0"], "--lanes must be at least 1, not 0"),
    ],
)
def test_ways_that_cannot_be_are_refused(
    more: list[str], says: str, tmp_path: Path, tiny_model_folder: Path, capsys
) -> None:
    given = command(tiny_model_folder, tmp_path / "b", "--value-placement", "host", *more)
    assert run(given) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "b").exists()


def test_a_dry_run_counts_every_way(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    more = ["--value-placement", "host", "--lanes", "1,2", "--batch-size", "4", "--eager-baseline"]
    more += ["--hit-rate", "0.5,measured", "--dry-run"]
    assert run(command(tiny_model_folder, tmp_path / "b", *more)) == 0
    # Full attention, the baseline, and ShadowKV twice at two hit rates; two rounds each.
    assert "12 measurements" in capsys.readouterr().out


def test_help_says_how_many_lanes_are_usual(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        f"one for each sequence, at most {MOST_LANES}; for every 2, at most "
        f"{MOST_LANES_OF_TWO_TABLES}, where the buffers differ in size; of several "
        f"micro-batches one for each, at most {MOST_LANES_OF_SEVERAL}; on a CPU 1" in text
    )


def test_memory_is_given_back_before_a_session_is_built(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    built, fits = throughput.Session, throughput._all_fit

    def build(*args: Any, **options: Any) -> Any:
        order.append("built")
        return built(*args, **options)

    def ask(*args: Any) -> bool:
        order.append("asked what fits")
        return fits(*args)

    monkeypatch.setattr(throughput, "Session", build)
    monkeypatch.setattr(throughput, "_all_fit", ask)
    monkeypatch.setattr(throughput, "release_memory", lambda: order.append("released"))
    assert run(command(tiny_model_folder, tmp_path / "b", "--rounds", "1")) == 0
    assert order.count("built") >= 2, "full attention, and ShadowKV"
    befores = [before for before, now in itertools.pairwise(order) if now != "released"]
    assert order[0] == "released"
    assert set(befores) == {"released"}


def test_fewer_parts_than_were_asked_for_are_told(capsys) -> None:
    assert cells(8, lanes=(2,)) == ["", "2 lanes", "2 lanes"]
    assert not capsys.readouterr().err
    cells(2, lanes=(4,))
    assert capsys.readouterr().err.count("fewer lanes or micro-batches than were asked for") == 2
    cells(0, lanes=(4,))
    assert not capsys.readouterr().err, "a batch of none is refused in a line of its own"
    cells(2, micro_batches=(3,))
    assert capsys.readouterr().err.count("fewer lanes or micro-batches than were asked for") == 2
