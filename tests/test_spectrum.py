"""Energy by rank: equal to singular values computed from the keys themselves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from shadowkv_cli.cli import run
from shadowkv_cli.config import ShadowKVSpec
from shadowkv_cli.model.loading import load_model
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops.rotary import unrotate
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.spectrum import Strays
from shadowkv_cli.tasks.rows import Dataset
from shadowkv_cli.tasks.tokenization import encode_prompt, load_tokenizer


def plain_keys(folder: Path, ids: list[int]) -> list[torch.Tensor]:
    """Pre-RoPE keys [S, Hk*D] of each layer, taken where the session hands them to the store."""
    loaded = load_model(ModelChoice(str(folder)))
    session = Session(loaded, [ShadowKVSpec(rank=8)], prompt_tokens=len(ids), new_tokens=1)
    found: list[torch.Tensor] = []
    add = session.store.add_layer

    def spy(layer: int, prompt, k: torch.Tensor, v: torch.Tensor) -> None:
        cos, sin = (half[0, : prompt.tokens] for half in session.store.tables.halves())
        plain = unrotate(k, cos, sin, session.store.tables.interleaved)
        found.append(plain.transpose(0, 1).flatten(1).double())
        add(layer, prompt, k, v)

    session.store.add_layer = spy
    session.prefill(ids)
    return found


def test_energies_are_those_of_the_singular_values(
    tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    only = ["--tasks", "vt", "--num-samples", "1", "--rank", "4,16,32", "--json"]
    assert run(["spectrum", *model, *only, "--output", str(tmp_path / "s")]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "s" / "spectrum.json").read_text())
    assert printed["energies"] == written["energies"]
    assert printed["strays"] == written["strays"]
    assert written["environment"]["git"] is not None

    [sample] = Dataset.open(ruler_folder).samples(1024, "vt", 1)
    keys = plain_keys(tiny_model_folder, encode_prompt(load_tokenizer("demo"), sample.text))
    for energy in printed["energies"]:
        rank = energy["rank"]
        shares = {}
        for name, centred in (("kept", False), ("around_mean", True)):
            values = [torch.linalg.svdvals(k - k.mean(0) if centred else k).square() for k in keys]
            shares[name] = [float(v[:rank].sum() / v.sum()) for v in values]
        assert energy["kept"] == pytest.approx(sum(shares["kept"]) / len(keys), abs=1e-5)
        assert energy["kept_lowest"] == pytest.approx(min(shares["kept"]), abs=1e-5)
        mean = sum(shares["around_mean"]) / len(keys)
        assert energy["around_mean"] == pytest.approx(mean, abs=1e-5)
    assert printed["energies"][-1]["kept"] == pytest.approx(1), "32 is the whole width"


def strays_of(rows: torch.Tensor) -> Counter[int]:
    """Rows [..., D] by how many of their elements a base and three bits do not tell."""
    upper = (rows.bfloat16().view(torch.int16) >> 8 & 0x7F).flatten(0, -2).tolist()
    return Counter(sum(u < max(*row, 7) - 7 for u in row) for row in upper)


def test_strays_are_those_of_what_the_model_has(
    tiny_model_folder: Path, ruler_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    assert run(["spectrum", *model, "--tasks", "vt", "--num-samples", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["strays"]
    [sample] = Dataset.open(ruler_folder).samples(1024, "vt", 1)
    ids = encode_prompt(load_tokenizer("demo"), sample.text)
    loaded = load_model(ModelChoice(str(tiny_model_folder)))
    with torch.inference_mode():
        held = loaded.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    found: dict[str, Counter[int]] = {"values": Counter(), "landmarks": Counter()}
    for layer in held:
        keys = layer.keys[0][:, : len(ids) // 8 * 8]
        found["values"] += strays_of(layer.values[0])
        found["landmarks"] += strays_of(keys.unflatten(1, (-1, 8)).mean(2))
    assert set(printed) == set(found)
    for name, counted in found.items():
        assert printed[name]["most_that_fit"] == 7
        assert sum(printed[name]["rows"]) == sum(counted.values())
        # Another prefill rounds otherwise, so an element at the edge may fall to the other side.
        for count, rows in enumerate(printed[name]["rows"]):
            assert abs(rows - counted[count]) <= 3, (name, count, rows, counted)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [([90, 8, 2], "values: 10 of 100 of a KV head have elements that must be listed, 2 at most: 7"),
     ([5], "0 of 5 of a KV head have elements that must be listed, 0 at most: 7 fit"),
     ([5, 0, 0, 0, 0, 0, 0, 0, 1], "1 of 6 of a KV head")],
)  # fmt: skip
def test_what_is_said_of_strays(tokens: list[int], said: str) -> None:
    note = Strays(tokens, 7).note("values")
    assert said in note
    assert note.endswith("they do not fit." if len(tokens) > 8 else "7 fit.")


def test_ranks_that_cannot_be_are_refused(
    tiny_model_folder: Path, ruler_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    for rank, expected in (("33", "1 to 32"), ("0", "1 to 32"), ("x", "whole numbers")):
        assert run(["spectrum", *model, "--rank", rank]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_is_a_file_is_refused_before_the_first_prefill(
    place: str, ruler_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    command = ["spectrum", "--model", "nowhere", "--data", str(ruler_folder)]
    assert run([*command, "--output", str(tmp_path / place)]) == 2
    assert f"'{tmp_path / 'file'}' is a file: choose another --output." in capsys.readouterr().err


def test_the_table_is_shown_even_if_it_cannot_be_written(
    tiny_model_folder: Path, ruler_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spectrum.json").mkdir()
    model = ["--model", str(tiny_model_folder), "--data", str(ruler_folder)]
    only = ["--tasks", "vt", "--num-samples", "1", "--rank", "8"]
    assert run(["spectrum", *model, *only, "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "Energy of the pre-RoPE keys" in shown.out
    assert f"Cannot write {tmp_path / 'spectrum.json'}" in shown.err
