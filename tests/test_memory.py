"""What memory is free: the machine's, its container's, and what is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shadowkv_cli.bench import memory

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
