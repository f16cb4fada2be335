"""A grid of context lengths by depths: one needle in essays, as RULER's niah_single_2 words it."""

from __future__ import annotations

from shadowkv_cli.tasks.ruler.definitions import TaskDefinition
from shadowkv_cli.tasks.ruler.draws import Workbench
from shadowkv_cli.tasks.ruler.niah import NeedleDraw


def grid_depths(count: int) -> list[float]:
    """So many depths from 0 to 100 percent, evenly spaced; at least two."""
    return [round(100 * i / (count - 1), 2) for i in range(count)]


class GridDraw(NeedleDraw):
    """Sample i stands at depth i modulo their number, so that more samples only add rows."""

    def __init__(self, bench: Workbench, task: TaskDefinition, context_length: int, index: int):
        super().__init__(bench, task, context_length, index)
        depths = grid_depths(bench.variant.depths)
        self._depths = [depths[index % len(depths)]]
