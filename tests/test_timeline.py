"""A step by phase, and a layer of it, from what a profiler saw; the kernels are made up here."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.bench import layer_speed
from shadowkv_cli.bench.timeline import STEPS, Kernel, by_phase, covered
from shadowkv_cli.errors import ShadowKVError

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12)


@given(SPANS)
def test_time_is_covered_once(spans: list[tuple[int, int]]) -> None:
    """By every whole unit of time that lies in any of the spans."""
    given_spans = [(start, start + length) for start, length in spans]
    units = {unit for start, end in given_spans for unit in range(start, end)}
    assert covered(given_spans) == len(units)
    assert covered(reversed(given_spans)) == len(units)


def test_a_phase_lasts_as_long_as_any_of_its_kernels_runs() -> None:
    """Lanes beside each other count once, and whoever waits for them does not count."""
    kernels = [
        Kernel("void select_in_cluster<bf16>", 1, 0, 400),
        Kernel("wait_for_rows(int*)", 2, 0, 390),
        Kernel("fetch_in_bulk(FetchParams)", 2, 100, 300),
        Kernel("fetch_in_bulk(FetchParams)", 3, 200, 500),
        Kernel("nvjet_sm90_tst", 1, 600, 1000),
        Kernel("at::native::CatArrayBatchedCopy", 1, 1000, 1040),
        Kernel("at::native::CatArrayBatchedCopy", 9, 600, 680),
    ]
    found = by_phase(kernels)
    assert found == {
        phase: us / 1e3 / STEPS
        for phase, us in {
            "select": 400, "matrix products": 400, "fetch": 400, "beside": 80, "other": 40,
        }.items()
    }  # fmt: skip
    assert next(reversed(found)) == "other", "the longest first"


def test_without_matrix_products_nothing_runs_beside_them() -> None:
    assert by_phase([Kernel("at::native::copy", 9, 0, 40)]) == {"other": 0.01}


def selections(*begins: float) -> list[Kernel]:
    return [Kernel("select_in_cluster", 1, begin, begin + 100) for begin in begins]


def test_a_layer_lasts_from_one_selection_to_the_next() -> None:
    """Of one step: what lies between two steps is no layer."""
    begins = [step * 5000 + at for step in range(STEPS) for at in (0, 490, 1010)]
    assert layer_speed.layer_us(selections(*begins), 3) == 505
    for layers in (1, 2, 4, 6):  # half of them: a selection may be two kernels
        with pytest.raises(ShadowKVError, match=f"12 selections of {layers} layers"):
            layer_speed.layer_us(selections(*begins), layers)
    with pytest.raises(ShadowKVError, match="0 selections of 2 layers"):
        layer_speed.layer_us([Kernel("nvjet", 1, 0, 9)], 2)


def test_a_trace_has_every_kernel_from_the_first_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "hits-88.csv"
    kernels = [*selections(1_000.5), Kernel("wait_for_rows", 7, 1_001, 1_090.25)]
    layer_speed.write_trace(kernels, path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["select", "waiting"]
    assert [(row["start_us"], row["end_us"]) for row in rows] == [
        ("0.00", "100.00"),
        ("0.50", "89.75"),
    ]


def test_a_layer_is_timed_on_a_gpu_alone(monkeypatch, capsys) -> None:
    monkeypatch.setattr(layer_speed.torch.cuda, "is_available", lambda: False)
    assert layer_speed.main(["--method", "shadowkv"]) == 2
    assert capsys.readouterr().err == "A layer of a captured step needs a GPU and the kernels.\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--hit-rate 0.88,x", "could not convert string to float: 'x'"),
        ("--hit-rate 0.88,0.59,0.4 --lanes 8,2", "2 numbers of lanes for 3 hit rates"),
        ("--hit-rate 1.5", "hit rates lie between 0 and 1"),
        ("--layers 1", "--layers 2"),
        ("--batch-size 0", "1 or more"),
    ],
)
def test_sizes_of_no_layer_are_refused(options: str, words: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        layer_speed.main(["--method", "shadowkv", *options.split()])
    assert words in capsys.readouterr().err
