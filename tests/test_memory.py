"""What memory is free: the machine's, its container's, and what is left of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shadowkv_cli.bench import cases, memory
from shadowkv_cli.config import ModelShape
from shadowkv_cli.run_config import BenchSettings

GB = 10**9


@pytest.fixture
def machine(tmp_path: Path, monkeypatch):
    """Set what the system says: bytes available, and files of the control group."""

    def tell(available: int, **files: str) -> None:
        monkeypatch.setattr(memory, "_proc_field", lambda file, name: available)
        monkeypatch.setattr(memory, "CGROUP", tmp_path)
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)

    return tell


def test_without_a_limit_the_machine_decides(machine) -> None:
    machine(40 * GB)
    assert memory.available_host_bytes() == 40 * GB
    machine(40 * GB, memory_max="max\n", memory_current=f"{9 * GB}\n")
    assert memory.available_host_bytes() == 40 * GB


def test_a_container_has_its_limit_but_for_what_it_holds(machine) -> None:
    machine(900 * GB, memory_max=str(137 * GB), memory_current=str(30 * GB))
    assert memory.available_host_bytes() == 107 * GB
    stat = f"anon {4 * GB}\ninactive_file {25 * GB}\nactive_file 5\n"
    machine(900 * GB, memory_stat=stat)
    assert memory.available_host_bytes() == 132 * GB, "a file that was read can be dropped"
    machine(20 * GB)
    assert memory.available_host_bytes() == 20 * GB


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
