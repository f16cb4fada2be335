"""Full attention in transformers' own forward, timed beside the engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shadowkv_cli.bench.eager import decode
from shadowkv_cli.bench.state import fill_synthetic
from shadowkv_cli.cli import run
from shadowkv_cli.config import FullSpec
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.testing import FAMILIES, tiny_model

STEPS = 12


def in_the_engine(session: Session, first: torch.Tensor) -> torch.Tensor:
    session.focus(FullSpec())
    tokens, taken = first, []
    with session.attached():
        for _ in range(STEPS):
            tokens = session.next_tokens(tokens).tokens
            taken.append(tokens.clone())
    return torch.stack(taken, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_decodes_what_full_attention_decodes(family: str) -> None:
    session = Session(
        tiny_model(family), [FullSpec()], prompt_tokens=300, new_tokens=STEPS, num_prompts=3,
        merge_cells=False,
    )  # fmt: skip
    first = fill_synthetic(session, 300)
    ours = in_the_engine(session, first)
    before = session.loaded.model.config._attn_implementation
    marks: list[int] = []
    theirs, finite = decode(session, first, STEPS, before_step=marks.append)
    assert torch.equal(ours, theirs)
    assert finite.all()
    assert marks == list(range(STEPS + 1))
    assert session.loaded.model.config._attn_implementation == before
    assert torch.equal(in_the_engine(session, first), ours), "nothing of the prompt was changed"


def test_prompts_of_unequal_length_and_too_many_steps_are_no_case_for_it() -> None:
    session = Session(
        tiny_model("llama"), [FullSpec()], prompt_tokens=60, new_tokens=2, num_prompts=2,
        merge_cells=False,
    )  # fmt: skip
    first = fill_synthetic(session, 60)
    with pytest.raises(AssertionError, match="room for 2"):
        decode(session, first, 3, before_step=lambda _: None)
    session.lengths[1] = 50
    with pytest.raises(AssertionError, match="unequal"):
        decode(session, first, 2, before_step=lambda _: None)


def command(model: Path, output: Path, *more: str) -> list[str]:
    fast = ["--rank", "8", "--sparse-budget", "32", "--decode-steps", "3", "--warmup-steps", "1"]
    place = ["--context-length", "512", "--output", str(output), "--eager-baseline"]
    return ["bench", "--model", str(model), *fast, *place, "--rounds", "2", *more]


@pytest.mark.parametrize("state", ["synthetic", "tokens"])
@pytest.mark.parametrize("share", [["--share"], []])
def test_bench_times_it_with_full_attentions_batch(
    state: str, share: list[str], tiny_model_folder: Path, tmp_path: Path, capsys
) -> None:
    told = command(tiny_model_folder, tmp_path / "b", "--state", state, "--batch-size", "2", *share)
    assert run(told) == 0
    shown = capsys.readouterr().out
    assert "transformers' own forward" in shown
    rows = read_run(tmp_path / "b").throughput
    eager = [row for row in rows if row["method"] == "eager-sdpa"]
    assert [row["round"] for row in eager] == [0, 1]
    for row in eager:
        assert row["error"] is None
        assert (row["spec"], row["batch_size"], row["attended_tokens"]) == ("full", 2, 512)
        assert len(row["step_ms"]) == 3
        assert "preallocated" in row["note"]
    assert {row["note"] for row in rows if row["method"] != "eager-sdpa"} == {None}
    assert len(rows) == 6
    assert run(told) == 0
    assert len(read_run(tmp_path / "b").throughput) == 6, "what is done is not done again"


def test_it_needs_no_full_attention_beside_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    more = ["--method", "shadowkv", "--state", "synthetic", "--batch-size", "equal"]
    assert run(command(tiny_model_folder, tmp_path / "b", *more)) == 0
    rows = read_run(tmp_path / "b").throughput
    assert {row["method"] for row in rows} == {"eager-sdpa", "shadowkv"}
    assert len({row["batch_size"] for row in rows}) == 1


def test_what_fails_in_it_leaves_the_others(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("shadowkv_cli.bench.eager.decode", fail)
    more = ["--state", "synthetic", "--share"]
    assert run(command(tiny_model_folder, tmp_path / "b", *more)) == 3
    errors = {r["method"]: r["error"] for r in read_run(tmp_path / "b").throughput}
    assert errors == {"full": None, "shadowkv": None, "eager-sdpa": "no room"}


def test_prompts_of_data_are_refused(
    tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, capsys
) -> None:
    assert run(command(tiny_model_folder, tmp_path / "b", "--data", str(ruler_folder))) == 2
    error = capsys.readouterr().err
    assert "--eager-baseline needs prompts of one length" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b").exists()
