"""Pinned host memory is kept for the next who asks, and given back where it is too small."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from shadowkv_cli.errors import ShadowKVError
from shadowkv_cli.methods import pinned
from shadowkv_cli.methods.pinned import HostMemory, idle_bytes


class Runtime:
    """What is asked of CUDA: every address that is pinned now, with its bytes."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.held: dict[int, int] = {}
        self.limit = limit
        self.registered = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if sum(self.held.values()) + size > self.limit:
            return 2
        assert address not in self.held, "a block is pinned once"
        self.held[address] = size
        self.registered += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0


class Owner:
    def __init__(self, *sizes: int) -> None:
        self.memory = HostMemory(pinned=True)
        self.tensors = [self.memory.take((size,), torch.float16) for size in sizes]


@pytest.fixture
def runtime(monkeypatch) -> Any:
    fake = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinned, "_idle", [])
    return fake


def test_a_smaller_owner_takes_what_a_larger_one_left(runtime: Runtime) -> None:
    first = Owner(3000, 3000, 0)
    assert runtime.registered == 2, "nothing is pinned for no values"
    addresses = {tensor.data_ptr() for tensor in first.tensors if tensor.numel()}
    assert idle_bytes() == 0
    del first
    gc.collect()
    assert idle_bytes() == 2 * 2 * 3000
    second = Owner(1000, 2500)
    assert {tensor.data_ptr() for tensor in second.tensors} == addresses
    assert [tensor.shape for tensor in second.tensors] == [(1000,), (2500,)]
    assert runtime.registered == 2
    assert idle_bytes() == 0


def test_the_smallest_that_is_large_enough_is_taken(runtime: Runtime) -> None:
    first = Owner(500, 4000, 900)
    wanted = first.tensors[2].data_ptr()
    del first
    gc.collect()
    assert Owner(800).tensors[0].data_ptr() == wanted


def test_what_is_too_small_is_given_back_before_more_is_taken(runtime: Runtime) -> None:
    first = Owner(1000, 1000)
    del first
    gc.collect()
    second = Owner(5000)
    assert list(runtime.held) == [second.tensors[0].data_ptr()]
    assert idle_bytes() == 0


def test_two_owners_never_share(runtime: Runtime) -> None:
    first, second = Owner(1000), Owner(1000)
    assert first.tensors[0].data_ptr() != second.tensors[0].data_ptr()
    first.tensors[0].fill_(1)
    second.tensors[0].fill_(2)
    assert first.tensors[0].eq(1).all()


def test_what_cannot_be_pinned_is_told_in_gigabytes(runtime: Runtime) -> None:
    runtime.limit = 5000
    with pytest.raises(ShadowKVError, match=r"after 1 pieces .* smaller batch"):
        Owner(2000, 2000)
    gc.collect()
    assert idle_bytes() == 4000, "what was pinned before it is not lost"


def test_what_was_idle_is_idle_again_when_its_next_owner_fails(runtime: Runtime) -> None:
    first = Owner(1000, 1000)
    del first
    gc.collect()
    runtime.limit = 5000
    with pytest.raises(ShadowKVError, match="Cannot pin"):
        Owner(1000, 3000)
    gc.collect()
    assert sorted(runtime.held.values()) == [2000], "the one that was too small is given back"
    assert idle_bytes() == 2000


def test_memory_that_is_not_pinned_is_nobodys_afterwards(runtime: Runtime) -> None:
    first = HostMemory(pinned=False)
    assert first.take((1000,), torch.float16).shape == (1000,)
    del first
    gc.collect()
    assert runtime.registered == 0
    assert idle_bytes() == 0


def test_any_dtype_and_shape_is_served_from_the_same_block(runtime: Runtime) -> None:
    first = Owner(4096)
    del first
    gc.collect()
    again = HostMemory(pinned=True).take((2, 8, 16), torch.float32)
    assert again.dtype == torch.float32
    assert again.is_contiguous()
    assert again.fill_(3).sum() == 3 * 256
