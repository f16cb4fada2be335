"""The benchmark of prefills: its rows, how it goes on, and the targets beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shadowkv_cli.bench import prefill_figures, prefill_parts, prefill_speed
from shadowkv_cli.bench.judging import FILE, write_and_print
from shadowkv_cli.bench.prefill_figures import PARTS, Figure, figures
from shadowkv_cli.bench.prefill_speed import Bench
from shadowkv_cli.bench.prefill_targets import CONTEXT, SAMPLE_CONTEXT, TARGETS, Measured, compare
from shadowkv_cli.cells import build_specs
from shadowkv_cli.errors import UsageError
from shadowkv_cli.model import exact_attention
from shadowkv_cli.model.rotary import attention_modules
from shadowkv_cli.results import RunFolder, read_run
from shadowkv_cli.testing import FAMILIES, tiny_model

LENGTH = 600


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true figures on a tiny model and lengths, on a CPU."""
    cell = "shadowkv:sparse_budget=64,rank=16"
    for module in (prefill_figures, prefill_speed):
        if hasattr(module, "CONTEXT"):
            monkeypatch.setattr(module, "CONTEXT", LENGTH)
    monkeypatch.setattr(prefill_figures, "SAMPLE_CONTEXT", LENGTH + 100)
    monkeypatch.setattr(prefill_figures, "LONG", (700, 800))
    monkeypatch.setattr(prefill_figures, "RANK", 16)
    monkeypatch.setattr(prefill_figures, "one_cell", lambda: build_specs([cell], {}))
    monkeypatch.setattr(
        prefill_figures,
        "cells_of",
        lambda sizes: build_specs([f"{cell},chunk_size={size}" for size in sizes], {}),
    )
    monkeypatch.setattr(
        prefill_figures,
        "swept_cells",
        lambda: build_specs([f"{cell},chunk_size={size}" for size in (4, 8)], {}),
    )
    monkeypatch.setattr(prefill_parts, "LARGE", 64)
    monkeypatch.setattr(prefill_speed, "load_model", lambda choice: loaded(choice.name))


def loaded(name: str):
    model = tiny_model("llama")
    object.__setattr__(model, "name", name)
    return model


def open_run(path: Path, **changes: bool) -> RunFolder:
    return RunFolder.open(
        path,
        kind="bench",
        identity={"measures": "prefill"},
        scope={},
        environment={"git": {"commit": "abc"}, "gpu": {"name": "H100"}},
        command=["python", "-m", "shadowkv_cli.bench.prefill_speed"],
        **changes,
    )


def test_every_figure_is_measured_once_and_kept(tmp_path: Path, capsys) -> None:
    wanted = figures(PARTS, [LENGTH, 300], ["flash", "math"])
    with open_run(tmp_path / "run") as run:
        bench = Bench(run, "short", "long")
        for figure in wanted:
            bench.measure(figure)
    rows = read_run(tmp_path / "run").prefill
    keys = [(r["measure"], r["variant"], r["context_length"], r["backend"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {r["measure"] for r in rows} == {
        *("attention", "products", "ops", "low rank", "svd"),
        *("prefill", "kept", "chunk sizes", "sample"),
    }
    assert all(r["seconds"] > 0 and r["error"] is None for r in rows)
    assert all(r["seconds"] == min(r["all_seconds"]) or r["measure"] == "sample" for r in rows)
    ways = {r["variant"] for r in rows if r["measure"] == "kept" and r["context_length"] == LENGTH}
    assert ways == {"beside", "in line", "beside, eigh", "in line, eigh"}
    for row in rows:
        if row["measure"] in ("attention", "products", "prefill"):
            assert row["share_of_product"] == row["tflops"] / row["product_tflops"]
    said = capsys.readouterr().err
    assert "A large matrix product" in said
    with open_run(tmp_path / "run") as run:
        again = Bench(run, "short", "long")
        for figure in wanted:
            again.measure(figure)
    assert read_run(tmp_path / "run").prefill == rows
    assert not capsys.readouterr().err, "nothing is loaded for nothing"
    write_and_print(compare(tmp_path / "run"), tmp_path / "run")
    targets = json.loads((tmp_path / "run" / FILE).read_text())
    assert len(targets) == len(TARGETS)
    told = {(t["measured"], t["commit"]) for t in targets}
    assert told == {(None, None)}, "they are of true lengths, which were not measured"


def test_what_finds_no_room_is_recorded_and_tried_again(tmp_path: Path) -> None:
    calls = []

    def full(model: object) -> dict:
        calls.append(model)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"a": {"seconds": 1.0}, "b": {"seconds": 2.0}}

    figure = Figure("sample", LENGTH, full, "flash", ("a", "b"))
    for expected in ([None, None], [None, None, 1.0, 2.0], [None, None, 1.0, 2.0]):
        with open_run(tmp_path / "run") as run:
            Bench(run, "short", "long").measure(figure)
            assert [row["seconds"] for row in run.read("prefill")] == expected
    assert len(calls) == 2
    errors = [row["error"] for row in read_run(tmp_path / "run").prefill]
    assert errors[:2] == ["OutOfMemoryError: CUDA out of memory"] * 2


def test_another_fault_is_not_taken_for_it(tmp_path: Path) -> None:
    def fail(model: object) -> dict:
        raise RuntimeError("an illegal memory access was encountered")

    with open_run(tmp_path / "run") as run, pytest.raises(RuntimeError, match="illegal"):
        Bench(run, "short", "long").measure(Figure("sample", LENGTH, fail))


def test_long_figures_have_the_model_of_more_positions(tmp_path: Path) -> None:
    names = []

    def work(model) -> dict:
        names.append(model.name)
        return {"": {"seconds": 1.0}}

    with open_run(tmp_path / "run") as run:
        bench = Bench(run, "short", "long")
        for long in (False, True, True, False):
            bench.measure(Figure(f"figure {len(names)}", LENGTH, work, long=long))
    assert names == ["short", "long", "long", "short"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operations_are_those_of_the_whole_model(family: str) -> None:
    """All but what the last layer does for the last token alone."""
    model = tiny_model(family)
    shape, tokens = model.shape, 100
    _, attention = prefill_parts.attention(model, tokens, "flash", 1)
    _, products = prefill_parts.products(model, tokens, 1)
    layers = shape.num_layers * (attention + products)
    last = model.model.model.layers[-1].mlp
    skipped = attention + 2 * tokens * sum(p.numel() for p in last.parameters())
    norms_and_biases = (
        2
        * tokens
        * sum(p.numel() for n, p in model.model.named_parameters() if "norm" in n or "bias" in n)
    )
    assert prefill_parts.prefill_flops(model, tokens) == layers - skipped + norms_and_biases
    assert attention == 2 * tokens**2 * shape.num_q_heads * shape.head_dim
    assert attention_modules(model.model)


# ---- targets ----


def row(measure: str, seconds: float, variant: str = "", length: int = CONTEXT, backend=None):
    return {
        "measure": measure,
        "variant": variant,
        "context_length": length,
        "backend": backend,
        "seconds": seconds,
        "num_layers": 32,
        "whole_layers": 31,
        "error": None,
    }


ROWS = [
    row("attention", 0.204, backend="cudnn"),
    row("attention", 0.179, backend="flash-attn-4"),
    row("products", 0.084),
    row("svd", 0.4),
    row("prefill", 8.9, backend="flash-attn-4"),
    row("prefill", 9.9, backend="cudnn"),
    row("prefill", 15.3, backend="flash"),
    row("kept", 9.1, "beside", backend="flash-attn-4"),
    row("kept", 9.3, "in line", backend="flash-attn-4"),
    row("kept", 10.1, "beside", backend="cudnn"),
    row("chunk sizes", 9.1, "1"),
    row("chunk sizes", 9.2, "4"),
    row("sample", 11.0, "full and shadowkv"),
    row("sample", 15.4, "24 cells"),
    row("sample", 12.5, "full and shadowkv", SAMPLE_CONTEXT),
]


def test_targets_follow_from_the_rows() -> None:
    measured = Measured(ROWS)
    found = {
        t.name: (t.measure(measured), t.met(t.measure(measured), t.wanted(measured)))
        for t in TARGETS
    }
    expected = [
        (8.9 / (31 * 0.263), True),
        (9.1, True),
        (10.1, True),
        (100 * (9.1 / 8.9 - 1), True),
        (100 * (9.2 / 9.1 - 1) / 3, True),
        (1.4, True),
        (12.5, True),
        (15.3 + 32 * 0.4, None),
    ]
    for (name, (value, met)), (wanted, verdict) in zip(found.items(), expected, strict=False):
        assert value == pytest.approx(wanted), name
        assert met is verdict, name
    assert measured.published_hours(8) == pytest.approx(1248 * 12.5 / 8 / 3600)


def test_a_later_run_tells_what_the_first_does_not(tmp_path: Path) -> None:
    rows = {
        "a": [row("kept", 9.2, "beside", backend="cudnn")],
        "b": [*ROWS, row("kept", 8.0, "beside", backend="cudnn")],
    }
    for name, of_run in rows.items():
        with open_run(tmp_path / name) as run:
            run.append("prefill", of_run)
    found = {t["name"]: t["measured"] for t in compare(tmp_path / "a", tmp_path / "b")}
    alone = {t["name"]: t["measured"] for t in compare(tmp_path / "b")}
    assert found.pop("prefill with one configuration, cudnn") == 9.2
    assert alone.pop("prefill with one configuration, cudnn") == 8.0
    assert found == alone, "nothing is made of figures of both"


def test_what_was_not_measured_is_neither_met_nor_missed(tmp_path: Path) -> None:
    assert all(t.measure(Measured([])) is None and t.met(None, 1.0) is None for t in TARGETS)
    slow = [{**r, "seconds": 3 * r["seconds"]} for r in ROWS]
    assert TARGETS[1].met(TARGETS[1].measure(Measured(slow)), 9.3) is False
    with pytest.raises(UsageError, match="no run"):
        compare(tmp_path / "nothing")


@pytest.mark.parametrize("arguments", [["--parts", "layer,all"], []])
def test_wrong_use_is_one_line(arguments: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    command = ["prefill_speed", "--output", str(tmp_path / "run"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        prefill_speed.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert ("has no 'all'" if arguments else "a GPU is needed") in said
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tmp_path: Path, monkeypatch, capsys) -> None:
    def on_gpu(choice):
        from shadowkv_cli.model.fused import join_projections
        from shadowkv_cli.model.loading import describe

        model = tiny_model("llama", dtype=torch.bfloat16, head_dim=64).model.to("cuda")
        join_projections(model)
        return describe(model, choice.name, random_weights=True)

    monkeypatch.setattr(prefill_speed, "load_model", on_gpu)
    lengths = ["--context-length", f"{LENGTH},2k"]
    monkeypatch.setattr("sys.argv", ["prefill_speed", "--output", str(tmp_path / "r"), *lengths])
    prefill_speed.main()
    rows = read_run(tmp_path / "r").prefill
    assert not [r for r in rows if r["error"] is not None]
    assert {r["backend"] for r in rows if r["measure"] == "prefill"} <= set(
        exact_attention.installed(torch.device("cuda"))
    )
    assert "Targets" in capsys.readouterr().out
