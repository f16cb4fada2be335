"""What memory is free: the machine's, its container's, and what is left of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shadowkv_cli import host_memory
from shadowkv_cli.bench import cases, memory
from shadowkv_cli.config import ModelShape
from shadowkv_cli.errors import UsageError
from shadowkv_cli.model import weights_fit
from shadowkv_cli.model.facts import ModelFacts, model_facts
from shadowkv_cli.model.loading import load_model
from shadowkv_cli.run_config import BenchSettings, ModelChoice

GB = 10**9


@pytest.fixture
def machine(tmp_path: Path, monkeypatch):
    """Set what the system says: bytes available, and files of the control group."""

    def tell(available: int, **files: str) -> None:
        monkeypatch.setattr(host_memory, "proc_field", lambda file, name: available)
        monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)

    return tell


def test_without_a_limit_the_machine_decides(machine) -> None:
    machine(40 * GB)
    assert host_memory.available_host_bytes() == 40 * GB
    machine(40 * GB, memory_max="max\n", memory_current=f"{9 * GB}\n")
    assert host_memory.available_host_bytes() == 40 * GB


def test_a_container_has_its_limit_but_for_what_it_holds(machine) -> None:
    machine(900 * GB, memory_max=str(137 * GB), memory_current=str(30 * GB))
    assert host_memory.available_host_bytes() == 107 * GB
    stat = f"anon {4 * GB}\ninactive_file {25 * GB}\nactive_file 5\n"
    machine(900 * GB, memory_stat=stat)
    assert host_memory.available_host_bytes() == 132 * GB, "a file that was read can be dropped"
    machine(20 * GB)
    assert host_memory.available_host_bytes() == 20 * GB


@pytest.mark.parametrize(("available", "left"), [(10, 1), (60, 6), (130, 6), (1000, 6)])
def test_values_leave_a_process_its_room(machine, available: int, left: int) -> None:
    machine(available * GB)
    assert memory.free_host_bytes() == (available - left) * GB


def test_on_a_cpu_caches_and_activations_share_the_memory(machine) -> None:
    machine(200 * GB)
    assert memory.free_device_bytes(torch.device("cpu"), 0.03) == 180 * GB


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "left"),
    [
        (1024, 8, 2.125e9),  # a share of the card
        (122_880, 8, 2.125e9),
        (245_760, 8, 2.511e9),  # what a layer of a longer prompt takes
        (122_880, 32, 4.121e9),  # and of one whose keys are wider
    ],
)
def test_a_gpu_that_decodes_leaves_what_filling_a_layer_takes(
    monkeypatch, tokens: int, kv_heads: int, left: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (68 * GB, 85 * GB))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    shape = ModelShape(32, 32, kv_heads, 128, 2)
    settings = BenchSettings((tokens,), state="synthetic", decode_steps=24)
    free = cases.free_bytes(torch.device("cuda"), settings, shape, tokens)
    assert 68 * GB - free == pytest.approx(left, rel=1e-3)
    prompts = replace(settings, state="tokens")
    assert cases.free_bytes(torch.device("cuda"), prompts, shape, tokens) == 68 * GB - 8.5 * GB


@pytest.mark.parametrize(
    "command",
    [
        "bench --model shape:llama-3.1-8b --context-length 4k --method full --state synthetic",
        "bench --model shape:llama-3.1-8b --context-length 4k --method full --plan",
        "bench --model shape:llama-3.1-8b --context-length 4k --dtype bfloat16 --method full",
        "bench --model demo --context-length 1k",
        "eval --model demo --data {data}",
        "sweep --model demo --data {data} --rank 8,16 --num-workers 2",
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_read(
    command: str, ruler_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from transformers import AutoModelForCausalLM

    from shadowkv_cli.cli import run

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(weights_fit, "available_host_bytes", lambda: 10**7)
    given = command.format(data=ruler_folder).split()
    output = [] if "--plan" in given else ["--output", str(tmp_path / "run")]
    assert run([*given, "--device", "cpu", *output]) == 2
    [told] = re.findall("^shadowkv: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert "10.0 MB of the host's memory are free: use" in told
    assert ("--dtype bfloat16" in told) == ("bfloat16" not in given)
    assert not (tmp_path / "run").exists()


def facts_of(name: str, weight_bytes: int, dtype: str = "bfloat16", **more) -> ModelFacts:
    return ModelFacts(
        name, dtype, 10, 10, ModelShape(2, 2, 2, 64, 2), 9999, weight_bytes, 128, **more
    )


def test_weights_in_fewer_bits_or_with_code_of_their_own_are_not_judged(
    tiny_model_folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(weights_fit, "available_host_bytes", lambda: 1000)
    cpu = torch.device("cpu")
    weights_fit.check_weights_fit(facts_of("demo", 900), cpu)
    weights_fit.check_weights_fit(facts_of("demo", 10**15, is_quantised=True), cpu)
    choice = ModelChoice(str(tiny_model_folder), "float32", "cpu")
    with pytest.raises(UsageError, match=r"take .* MB in float32, 1.0 kB of the host's memory"):
        load_model(choice)
    assert load_model(replace(choice, trust_remote_code=True)).weight_bytes > 1000


def test_a_checkpoint_in_fewer_bits_is_known_by_its_configuration(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model_folder / "config.json").read_text())
    for more, found in (({}, False), ({"quantization_config": {"quant_method": "awq"}}, True)):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        facts = model_facts(ModelChoice(str(tmp_path), "float32", "cpu"), torch.float32)
        assert facts.is_quantised == found


def test_a_system_that_tells_no_memory_refuses_no_weights(monkeypatch) -> None:
    monkeypatch.setattr(weights_fit, "available_host_bytes", lambda: 0)
    weights_fit.check_weights_fit(facts_of("demo", 10**15), torch.device("cpu"))


def test_random_weights_of_a_gpu_take_no_host_memory(monkeypatch) -> None:
    monkeypatch.setattr(weights_fit, "available_host_bytes", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GB, 80 * GB))
    gpu, shape = torch.device("cuda:0"), "shape:llama-3.1-8b"
    weights_fit.check_weights_fit(facts_of(shape, 16 * GB), gpu)
    with pytest.raises(UsageError, match=r"16.0 GB in bfloat16, 1.0 kB of the host's memory"):
        weights_fit.check_weights_fit(facts_of("some/model", 16 * GB), gpu)
    with pytest.raises(UsageError, match=r"32.0 GB in float32, 20.0 GB on cuda:0 are free"):
        weights_fit.check_weights_fit(facts_of(shape, 32 * GB, "float32"), gpu)
