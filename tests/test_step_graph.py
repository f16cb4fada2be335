"""What surrounds the capture of a step, as far as it needs no GPU."""

from __future__ import annotations

import gc
import weakref

import pytest

from shadowkv_cli.model.step_graph import _without_collection


class Loop:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_goes_before_and_none_within(enabled: bool) -> None:
    was_enabled, thresholds, gone = gc.isenabled(), gc.get_threshold(), []
    (gc.enable if enabled else gc.disable)()
    gc.set_threshold(1)
    try:
        weakref.finalize(Loop(), gone.append, "before")
        with _without_collection():
            assert gone == ["before"]
            weakref.finalize(Loop(), gone.append, "within")
            kept = [Loop() for _ in range(1000)]
            assert gone == ["before"]
        assert gc.isenabled() is enabled
        del kept
        gc.collect()
        assert gone == ["before", "within"]
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if was_enabled else gc.disable)()
