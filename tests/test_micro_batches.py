"""Decoding in micro-batches gives what decoding all rows at once gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shadowkv_cli.bench.driven_hits import drive
from shadowkv_cli.bench.state import fill_synthetic
from shadowkv_cli.cells import build_specs
from shadowkv_cli.cli import run
from shadowkv_cli.errors import UsageError
from shadowkv_cli.methods.shadowkv import ShadowKVGroup
from shadowkv_cli.model.failures import MethodFailure
from shadowkv_cli.model.micro_batches import MicroBatches, in_parts
from shadowkv_cli.model.rotary import decoder_layers
from shadowkv_cli.model.session import Session
from shadowkv_cli.results import read_run
from shadowkv_cli.testing import FAMILIES, tiny_model

SETTINGS = {
    "rank": "16",
    "sparse_budget": "32",
    "value_placement": "host",
    "value_buffer": "2",
    "dense_fallback": "never",
}
STEPS = 10


def filled(family: str, rows: int, method: str = "shadowkv") -> tuple[Session, torch.Tensor]:
    """A session of one cell on prompts of unequal lengths, and the tokens to begin with."""
    [spec] = build_specs([method], SETTINGS if method == "shadowkv" else {})
    session = Session(
        tiny_model(family),
        [spec],
        prompt_tokens=400,
        new_tokens=STEPS,
        num_prompts=rows,
        merge_cells=False,
    )
    return session, fill_synthetic(session, [400 - 37 * row for row in range(rows)])


def decoded(session: Session, first: torch.Tensor, steps: int = STEPS) -> dict[str, Any]:
    """All that can be seen of an answer, from the end of the prefill."""
    session.reset()
    tokens, logits, taken = first, [], []
    with session.attached():
        for _ in range(steps):
            stepped = session.next_tokens(tokens)
            tokens = stepped.tokens
            logits.append(stepped.logits.clone())
            taken.append(tokens.tolist())
    return {
        "logits": torch.stack(logits),
        "tokens": taken,
        "audits": [session.audit(row, steps) for row in range(len(first))],
        "hit rate": session.hit_rate(2, steps),
    }


def check_same(found: dict[str, Any], expected: dict[str, Any], case: object) -> None:
    assert torch.allclose(found.pop("logits"), expected["logits"], atol=1e-4), case
    assert found == {name: seen for name, seen in expected.items() if name != "logits"}, case


@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("lanes", [1, 2])
def test_parts_decode_what_all_rows_decode_at_once(rows: int, lanes: int) -> None:
    session, first = filled("llama", rows)
    [spec] = session.specs
    session.focus(spec)
    expected = decoded(session, first)
    assert 0 < expected["hit rate"] < 1
    for count in (2, 3, 8):
        session.focus(spec, lanes=lanes, micro_batches=count)
        sizes = [len(group.rows) for _, group in session.batch.parts]
        assert sum(sizes) == rows
        assert 1 < len(sizes) <= count
        for _ in range(2):  # the second time after a reset
            check_same(decoded(session, first), expected, (rows, lanes, count))
    session.focus(spec, lanes=lanes)
    assert session.micro_batches is None
    assert len(session.batch.parts) == 1
    check_same(decoded(session, first), expected, "all at once again")


def test_an_odd_batch_has_a_smaller_last_part_and_one_row_has_none() -> None:
    session, _ = filled("llama", 3)
    session.focus(session.specs[0], micro_batches=2)
    assert [rows for rows, _ in session.batch.parts] == [[0, 1], [2]]
    alone, first = filled("llama", 1)
    alone.focus(alone.specs[0], micro_batches=2)
    assert alone.micro_batches is None
    assert decoded(alone, first)["hit rate"] is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["full", "shadowkv"])
def test_every_family_takes_a_step_in_parts(family: str, method: str) -> None:
    session, first = filled(family, 3, method)
    [spec] = session.specs
    session.focus(spec)
    expected = decoded(session, first, 1)
    session.focus(spec, micro_batches=2)
    check_same(decoded(session, first, 1), expected, (family, method))


def test_layers_run_part_by_part_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    session, first = filled("llama", 3)
    seen, select = [], ShadowKVGroup.select

    def note(self: ShadowKVGroup, layer: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append((layer, len(self.rows)))
        return select(self, layer, q, scale)

    monkeypatch.setattr(ShadowKVGroup, "select", note)
    session.focus(session.specs[0], micro_batches=2)
    decoded(session, first, 1)
    assert seen == [(0, 2), (0, 1), (1, 2), (1, 1)]
    assert session.loaded.shape.num_layers == 2


def test_a_turn_of_several_tokens_and_rows_that_end_are_as_all_at_once() -> None:
    session, first = filled("llama", 4)
    [spec] = session.specs
    turn = torch.arange(12).view(4, 3) + 5
    counts = torch.tensor([3, 1, 2, 3], dtype=torch.int32)
    found = []
    for micro_batches in (1, 2):
        session.focus(spec, micro_batches=micro_batches)
        logits = session.append(turn, counts)
        session.reset()
        # The rows of the first part end one after the other, then one of the second.
        found.append((logits, session.generate(first, [2, 4, 6, STEPS], frozenset())))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][1] == found[1][1]
    assert [len(answer) for answer in found[1][1]] == [2, 4, 6, STEPS]


def test_queries_that_drift_are_those_of_the_same_rows() -> None:
    session, first = filled("llama", 3)
    [spec] = session.specs
    found = []
    for micro_batches in (1, 2):
        session.focus(spec, micro_batches=micro_batches)
        torch.manual_seed(3)
        change = drive(session, first, 0.5, 2, STEPS - 2)
        found.append((change, session.hit_rate(3, STEPS)))
        torch.manual_seed(4)
        assert session.drift is not None
        session.drift.restart()
        found.append((change, decoded(session, first)["audits"]))
    assert found[:2] == found[2:]
    session.focus(spec)
    assert session.drift is None


def test_logits_that_are_not_finite_are_found_in_the_last_part() -> None:
    session, first = filled("llama", 3)
    session.focus(session.specs[0], micro_batches=2)
    with torch.inference_mode():
        _, last = session.batch.parts[1]
        assert isinstance(last, ShadowKVGroup)
        last.values[0].fill_(float("nan"))
    with pytest.raises(MethodFailure, match="not finite"):
        session.decode_step(first)


class Pair(nn.Module):
    """A layer that returns more than hidden states."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def test_a_layer_that_returns_more_than_hidden_states_is_refused() -> None:
    parts = MicroBatches(torch.device("cpu"), 2)
    parts.rows = [slice(0, 2), slice(2, 3)]
    forward = in_parts(Pair(), parts, ends=True)
    with pytest.raises(UsageError, match=r"Pair returns more .* use --micro-batches 1"):
        forward(torch.zeros(3, 1, 4))
    parts.rows = ()
    assert isinstance(forward(torch.zeros(3, 1, 4)), tuple), "as it is where there are no parts"


def test_only_what_has_a_row_for_each_sequence_is_cut() -> None:
    seen: list[tuple[Any, ...]] = []

    class Layer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append((*args, *kwargs.values()))
            return hidden_states + len(seen)

    parts = MicroBatches(torch.device("cpu"), 2)
    parts.rows = [slice(0, 2), slice(2, 3)]
    own, shared, flat = torch.arange(6).view(3, 2), torch.zeros(1, 2), torch.arange(3)
    out = in_parts(Layer(), parts, ends=True)(
        torch.zeros(3, 1, 4), own, pair=(own, shared), flat=flat, flag=True
    )
    assert out[:, 0, 0].tolist() == [1, 1, 2]
    for place, rows in enumerate(parts.rows):
        first, (again, untouched), third, flag = seen[place]
        assert torch.equal(first, own[rows])
        assert torch.equal(again, own[rows])
        assert untouched is shared
        assert third is flat
        assert flag is True


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_by_what_they_hold(family: str) -> None:
    model: Any = tiny_model(family).model
    assert decoder_layers(model) == list(model.model.layers)


def bench(model: Path, output: Path, *more: str) -> list[str]:
    fast = ["--rank", "8", "--sparse-budget", "32", "--decode-steps", "4", "--warmup-steps", "2"]
    place = ["--context-length", "512", "--state", "synthetic", "--output", str(output)]
    return ["bench", "--model", str(model), *fast, *place, "--rounds", "1", *more]


ON_HOST = ["--value-placement", "host", "--batch-size", "4"]


def test_bench_measures_both_and_their_cells_say_so(
    tiny_model_folder: Path, tmp_path: Path, capsys
) -> None:
    more = [*ON_HOST, "--micro-batches", "1,2", "--hit-rate", "0.5", "--method", "full,shadowkv"]
    command = bench(tiny_model_folder, tmp_path / "b", *more, "--share")
    assert run([*command, "--dry-run"]) == 0
    assert "3 measurements" in capsys.readouterr().out
    assert run([*command, "--plan", "--json"]) == 0
    assert '"micro_batches": 2' in capsys.readouterr().out
    assert run(command) == 0
    rows = read_run(tmp_path / "b").throughput
    found = [(row["cell"].partition(" (")[2], row["micro_batches"], row["lanes"]) for row in rows]
    assert found == [
        ("", 1, 1),
        ("hits driven to 50%; 1 micro-batch)", 1, 1),
        ("hits driven to 50%; 2 micro-batches)", 2, 1),
    ]
    assert rows[1]["hit_rate"] == pytest.approx(rows[2]["hit_rate"], abs=0.1)
    assert rows[1]["attended_tokens"] == rows[2]["attended_tokens"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([*ON_HOST, "--micro-batches", "0"], "--micro-batches must be at least 1, not 0"),
        ([*ON_HOST, "--micro-batches", "two"], "--micro-batches 'two' is no number of"),
        (["--micro-batches", "2"], "--micro-batches overlap fetches from the host"),
    ],
)
def test_micro_batches_that_cannot_be_are_refused(
    more: list[str], says: str, tmp_path: Path, tiny_model_folder: Path, capsys
) -> None:
    assert run(bench(tiny_model_folder, tmp_path / "b", *more)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "b").exists()
