"""Probes: measured once and kept safely; time estimates that follow from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shadowkv_cli.bench import plan, probes
from shadowkv_cli.bench.estimate import (
    LAYER_OVERHEAD_S,
    decode_seconds,
    prefill_flops,
    prefill_seconds,
)
from shadowkv_cli.bench.probes import Probe
from shadowkv_cli.bench.together import step_ms
from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import FullSpec, MethodSpec
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.model.facts import ModelFacts, model_facts
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.testing import tiny_model

CPU = torch.device("cpu")
H100 = Probe("H100", 3030.0, {"bfloat16": 700.0}, 54.0, 53.0, 50.4, "", "2026-11-24")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shadowkv"


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CPU_READ_BYTES", 2**20)
    monkeypatch.setattr(probes, "REPEATS", 1)


def test_bandwidths_are_those_of_the_fastest_repeat(
    small_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_seconds", lambda *_: [0.4, 0.1, 0.2])
    assert probes._read_gb_s(CPU) == pytest.approx(2**20 / 0.1 / 1e9)


def test_a_gpu_moves_bytes_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(probes, "_seconds", lambda *given: asked.append(given[2]) or [2.0, 1.0])
    found = [probes._fastest_s(torch.device(kind), lambda: None) for kind in ("cuda", "cpu")]
    assert (found, asked) == ([1.0, 1.0], [probes.STEADY_S, 0.0])


def test_repeats_go_on_until_clocks_have_risen(
    small_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(
        probes, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)) / 1000)
    )
    assert len(probes._seconds(CPU, lambda: None, 0.0295)) == 30 - probes.WARM_UP
    assert len(probes._seconds(CPU, lambda: None)) == 1, "REPEATS"


def test_measure_on_a_cpu(small_work: None) -> None:
    probe = probes.measure(CPU, (torch.float32, torch.bfloat16))
    assert probe.memory_read_gb_s > 0
    assert probe.matmul_tflops.keys() == {"float32", "bfloat16"}
    assert (probe.h2d_gb_s, probe.d2h_gb_s, probe.zero_copy_gather_gb_s) == (None, None, None)
    assert "CPU" in probe.zero_copy_reason


def test_slow_products_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def product(size: int, *_: object) -> int:
        sizes.append(size)
        return size

    monkeypatch.setattr(probes, "_product", product)
    monkeypatch.setattr(probes, "_seconds", lambda *_: [probes.SLOW_PRODUCT_S * 2])
    assert probes._tflops(CPU, torch.float16) == 2 * 256**3 / (probes.SLOW_PRODUCT_S * 2) / 1e12
    assert sizes == [256], "the large product was tried"


def test_stored_is_what_was_kept(cache: Path) -> None:
    assert probes.stored("H100") is None
    probes.store(H100)
    other = dataclasses.replace(H100, device_name="another")
    probes.store(other)
    assert probes.stored("H100") == H100
    assert probes.stored("another") == other
    assert [path.name for path in cache.iterdir()] == ["probes.json"], "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"H100": 3}',
        '{"H100": {"memory_read_gb_s": 1.0}}',
        json.dumps({"H100": {**H100.as_json(), "memory_read_gb_s": -1.0}}),
        json.dumps({"H100": {**H100.as_json(), "matmul_tflops": None}}),
    ],
)
def test_a_broken_file_is_ignored_with_a_notice(
    cache: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir(parents=True)
    (cache / "probes.json").write_text(content)
    assert probes.stored("H100") is None, content
    assert "ignored" in capsys.readouterr().err, content
    probes.store(H100)
    assert probes.stored("H100") == H100, content


def test_a_cache_that_cannot_be_written_stops_nothing(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the folder's place")
    probes.store(H100)
    assert "not kept" in capsys.readouterr().err


def test_stored_or_measured_measures_once(
    small_work: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = probes.stored_or_measured(CPU)
    assert "Measuring" in capsys.readouterr().err
    monkeypatch.setattr(probes, "measure", lambda *_: pytest.fail("measured again"))
    again = probes.stored_or_measured(CPU, [torch.float32])
    assert again.as_json() == first.as_json()


def test_a_dtype_that_was_not_measured_is_measured_beside_the_others(small_work: None) -> None:
    probes.store(dataclasses.replace(H100, device_name=probes.device_name(CPU)))
    probe = probes.stored_or_measured(CPU, [torch.float64])
    assert probe.matmul_tflops.keys() == {"float32", "bfloat16", "float64"}


def test_facts_equal_those_of_a_model_in_memory(tmp_path: Path) -> None:
    loaded = tiny_model("llama")
    loaded.model.config.save_pretrained(tmp_path)
    facts = model_facts(ModelChoice(str(tmp_path), offline=True), loaded.dtype)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    config = loaded.model.config
    ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert (facts.shape, facts.max_positions) == (loaded.shape, loaded.max_positions)
    assert facts.parameters == parameters
    last_mlp = sum(p.numel() for p in loaded.model.model.layers[-1].mlp.parameters())
    assert facts.layer_parameters == parameters - ends - last_mlp
    assert facts.weight_bytes == parameters * loaded.dtype.itemsize


def test_facts_of_the_demo_model() -> None:
    facts = model_facts(ModelChoice("demo"), torch.float32)
    assert (facts.dtype, facts.shape.num_layers) == ("float32", 6)


def test_facts_of_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        model_facts(ModelChoice(str(tmp_path)), torch.float32)
    with pytest.raises(ShadowKVError, match="Cannot load the model nobody/nothing"):
        model_facts(ModelChoice("nobody/nothing", offline=True), torch.float32)


def llama_8b() -> ModelFacts:
    shape = dataclasses.replace(model_facts(ModelChoice("demo"), torch.bfloat16).shape)
    shape = dataclasses.replace(shape, num_layers=32, num_q_heads=32, num_kv_heads=8, head_dim=128)
    return ModelFacts(
        name="8b",
        dtype="bfloat16",
        parameters=8_030_261_248,
        layer_parameters=6_979_588_096 - 3 * 4096 * 14_336,
        shape=shape,
        max_positions=131_072,
        weight_bytes=16_060_522_496,
        hidden_size=4096,
    )


def test_prefill_follows_from_operations() -> None:
    facts, tokens = llama_8b(), 122_880
    linear, attention = prefill_flops(facts, tokens)
    assert linear == 2 * facts.layer_parameters * tokens
    assert attention == 2 * tokens**2 * 4096 * 31, "the last layer attends from one token"
    # Measured on an H100 in plain transformers: 15.3 s with SDPA's flash attention.
    assert 8 < prefill_seconds(facts, H100, tokens) < 30
    twice = {"matmul_tflops": {"bfloat16": 1400.0}, "memory_read_gb_s": 2 * H100.memory_read_gb_s}
    fast = dataclasses.replace(H100, **twice)
    overhead = 32 * LAYER_OVERHEAD_S
    slow_s, fast_s = (prefill_seconds(facts, p, tokens) - overhead for p in (H100, fast))
    assert slow_s == pytest.approx(2 * fast_s)


@pytest.mark.parametrize(
    ("backend", "cells", "measured_s"),
    [("cudnn", [], 9.9), ("flash", [], 15.3), ("cudnn", ["shadowkv"], 10.5)],
)
def test_a_probed_backend_foretells_what_was_measured(
    backend: str, cells: list[str], measured_s: float
) -> None:
    """A prefill of 122,880 tokens on an H100 in plain transformers."""
    speeds = {"cudnn": 607.0, "flash": 343.0, "flash-attn-4": 692.0}
    probe = dataclasses.replace(H100, attention_tflops=speeds)
    facts, specs = llama_8b(), build_specs(cells, {}) if cells else []
    found = prefill_seconds(facts, probe, 122_880, specs, backend)
    assert found == pytest.approx(measured_s, rel=0.1)
    best = prefill_seconds(facts, probe, 122_880, specs)
    assert best == prefill_seconds(facts, probe, 122_880, specs, "flash-attn-4") < found


def test_a_probe_of_attention_is_kept(small_work: None) -> None:
    probe = probes.measure(CPU, (torch.float32,))
    assert probe.attention_tflops.keys() == {"flash"}
    probes.store(probe)
    kept = probes.stored(probe.device_name)
    assert kept is not None
    assert kept.attention_tflops["flash"] == pytest.approx(
        probe.attention_tflops["flash"], rel=1e-2
    )
    before = {k: v for k, v in probe.as_json().items() if k != "attention_tflops"}
    assert Probe.from_json(before).attention_tflops == {}
    with pytest.raises(ValueError, match="positive"):
        Probe.from_json({**before, "attention_tflops": {"flash": 0.0}})


def test_cells_that_decode_together_read_the_weights_once() -> None:
    facts = llama_8b()

    def step(*cells: str) -> float:
        return step_ms(
            build_specs(cells, {}), facts.shape, facts.weight_bytes, H100, 122_880, hit_rate=0.6
        )

    def alone(spec: MethodSpec) -> dict[str, float]:
        return plan.phase_ms(
            spec, facts.shape, facts.weight_bytes, H100, 122_880, 1, hit_rate=0.6, lanes=1
        )

    assert step("full") == pytest.approx(alone(FullSpec())["step"])
    one = "shadowkv:value_placement=host"
    assert step(one) == pytest.approx(alone(build_specs([one], {})[0])["step"], rel=0.05)
    both = step("full", one)
    assert max(step("full"), step(one)) < both < step("full") + step(one) - 5
    other = f"{one},sparse_budget=1024"
    merged, apart = step(one, other), step(one, f"{other},chunk_size=16")
    assert step(one) < merged < 2 * step(one)
    assert merged < apart + 1
    short = "shadowkv:sparse_budget=122880"
    assert step("full", short) == step("full"), "dense cells share a row"


def test_decoding_follows_from_bytes() -> None:
    facts = llama_8b()
    cache = facts.shape.kv_bytes(122_880)
    one = decode_seconds(facts, H100, cache, 1)
    # Measured on an H100: 72 tokens/s within a CUDA graph, which saves most of the overhead.
    assert 1 / 72 < one < 0.1
    assert decode_seconds(facts, H100, cache, 128) == pytest.approx(128 * one)
    four = decode_seconds(facts, H100, 4 * cache, 1)
    assert one < four < 4 * one, "the weights are read once for all rows"


@pytest.mark.gpu
def test_measure_on_a_gpu() -> None:
    device = torch.device("cuda")
    probe = probes.measure(device, probes.default_dtypes(device))
    assert probe.zero_copy_gather_gb_s is not None, probe.zero_copy_reason
    assert 1 < probe.zero_copy_gather_gb_s < 1.1 * probe.memory_read_gb_s
    assert probe.h2d_gb_s is not None
    assert probe.d2h_gb_s is not None
    assert probe.matmul_tflops["bfloat16"] > probe.matmul_tflops["float32"]


@pytest.mark.gpu
def test_gather_is_bitwise_equal() -> None:
    zero_copy = pytest.importorskip("shadowkv_cli.bench.zero_copy")
    source = torch.randint(-(2**62), 2**62, (1000, zero_copy.ROW_WORDS)).pin_memory()
    for count in (1, 7, 333):
        rows = torch.randint(0, 1000, (count,))
        out = torch.zeros(count, zero_copy.ROW_WORDS, dtype=torch.int64, device="cuda")
        zero_copy.gather_rows(source, rows.cuda(), out)
        assert torch.equal(out.cpu(), source[rows]), count
