"""Pinned host memory is kept for the next who asks, and given back where it is too small."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
        self.tensors = self.memory.take(*(((size,), torch.float16) for size in sizes))


def patched(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinned, "_idle", [])
    return fake


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return patched(monkeypatch)


def test_a_smaller_owner_takes_what_a_larger_one_left(runtime: Runtime) -> None:
    first = Owner(3000, 0, 3000)
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


def test_more_is_never_pinned_than_one_of_two_owners_asks_for(runtime: Runtime) -> None:
    """Otherwise the second one's last layer would not fit beside larger layers of the first."""
    first = Owner(*[5000] * 25)
    del first
    gc.collect()
    second = Owner(*[4700] * 26)
    assert sum(runtime.held.values()) <= 2 * 25 * 5000
    # Each of the first one's is 300 too large, and there were 2,800 more of it.
    assert list(runtime.held.values()).count(2 * 5000) == 9
    assert runtime.registered == 25 + 17
    assert len({tensor.data_ptr() for tensor in second.tensors}) == 26


def test_an_owner_of_more_pieces_of_a_size_keeps_those_that_are_there(runtime: Runtime) -> None:
    first = Owner(*[1000] * 24)
    addresses = {tensor.data_ptr() for tensor in first.tensors}
    del first
    gc.collect()
    second = Owner(*[1000] * 32)
    assert addresses < {tensor.data_ptr() for tensor in second.tensors}
    assert runtime.registered == 32


@given(
    first=st.lists(st.integers(0, 60), max_size=8),
    second=st.lists(st.integers(0, 60), max_size=8),
)
def test_whatever_two_owners_ask_for(first: list[int], second: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        runtime = patched(patch)
        owner = Owner(*first)
        del owner
        owner = Owner(*second)
        assert [tensor.numel() for tensor in owner.tensors] == second
        places = [tensor.data_ptr() for tensor in owner.tensors if tensor.numel()]
        assert len(set(places)) == len(places)
        assert sum(runtime.held.values()) <= 2 * max(sum(first), sum(second))
        del owner
        assert idle_bytes() == sum(runtime.held.values()), "nothing is lost"


def test_two_owners_never_share(runtime: Runtime) -> None:
    first, second = Owner(1000), Owner(1000)
    assert first.tensors[0].data_ptr() != second.tensors[0].data_ptr()
    first.tensors[0].fill_(1)
    second.tensors[0].fill_(2)
    assert first.tensors[0].eq(1).all()


def test_what_cannot_be_pinned_is_told(runtime: Runtime) -> None:
    runtime.limit = 5000
    with pytest.raises(ShadowKVError, match=r"pin 4.0 kB .* beside 4.0 kB .* smaller batch"):
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
    assert [t.shape for t in first.take(((1000,), torch.float16), ((0, 2), torch.uint8))] == [
        (1000,), (0, 2)
    ]  # fmt: skip
    del first
    gc.collect()
    assert runtime.registered == 0
    assert idle_bytes() == 0


def test_any_dtype_and_shape_is_served_from_the_same_block(runtime: Runtime) -> None:
    first = Owner(4096)
    del first
    gc.collect()
    [again] = HostMemory(pinned=True).take(((2, 8, 16), torch.float32))
    assert again.dtype == torch.float32
    assert again.is_contiguous()
    assert again.fill_(3).sum() == 3 * 256
