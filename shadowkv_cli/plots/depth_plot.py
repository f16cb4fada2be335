"""Single needles: score by the needle's depth and the context length.

RULER's needles stand anywhere, so they are drawn in five bands; those of `build-data niah` stand at
the depths of their grid, which are drawn as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, Series, pretty_cell, representative_cells
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import chosen_rows, group_by
from shadowkv_cli.tasks.ruler.definitions import GRID_TASK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_SAMPLES = 10
BANDS = 5
MAX_CELLS = 6
Band = tuple[float, float]
"""Lowest and highest depth in percent; the same for one depth of a grid."""
FIVE_BANDS: list[Band] = [(100 * i / BANDS, 100 * (i + 1) / BANDS) for i in range(BANDS)]


@dataclass(frozen=True)
class DepthScore:
    """Mean score (0 to 100) of one cell at one length within one band of depths (percent).

    `depth_low` and `depth_high` are the same at a depth of a grid.
    """

    cell: str
    context_length: int
    depth_low: float
    depth_high: float
    n: int
    score: float

    @property
    def band(self) -> Band:
        return self.depth_low, self.depth_high


def _band(row: Row) -> Band:
    depth = row["depth"]
    if row["task"] == GRID_TASK:
        return depth, depth
    return FIVE_BANDS[min(int(depth * BANDS / 100), BANDS - 1)]


def depth_scores(series: Series) -> list[DepthScore]:
    """Mean scores of the single-needle rows that the method itself answered, by depth."""
    rows = [
        r for r in series.predictions if r.get("depth") is not None and not r.get("dense_fallback")
    ]
    groups = group_by(rows, lambda r: (r["cell"], r["context_length"], _band(r)))
    found = []
    for (cell, length, (low, high)), own in groups.items():
        chosen, _ = chosen_rows(own)
        if chosen:
            score = 100 * fmean(row["score"] for row, _ in chosen)
            found.append(DepthScore(cell, length, low, high, len(chosen), score))
    return found


def unavailable(data: PlotData) -> str | None:
    counts = [d.n for s in data.series for d in depth_scores(s)]
    if not counts:
        return (
            "needs single needles (niah_single_1 to 3, or `build-data niah`), whose rows carry a "
            "depth"
        )
    if max(counts) < MIN_SAMPLES:
        return (
            f"needs {MIN_SAMPLES} samples behind a depth and length; the most here are "
            f"{max(counts)}: evaluate more samples"
        )
    return None


def points(data: PlotData) -> list[Row]:
    return [
        {"run": series.label, **vars(d), "drawn": d.n >= MIN_SAMPLES}
        for series in data.series
        for d in depth_scores(series)
    ]


def _bands(found: Sequence[DepthScore]) -> list[Band]:
    """The rows of the map, from the beginning of the prompt to its end."""
    there = {d.band for d in found}
    return sorted(there if all(low == high for low, high in there) else there | {*FIVE_BANDS})


def _draw_panel(
    axes: Axes, found: Sequence[DepthScore], lengths: Sequence[int], bands: Sequence[Band]
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = {(d.context_length, d.band): d for d in found}
    for i, length in enumerate(lengths):
        for place, band in enumerate(bands):
            d = shown.get((length, band))
            enough = d is not None and d.n >= MIN_SAMPLES
            colour = colormaps["viridis"](d.score / 100) if d and enough else "white"
            axes.add_patch(
                Rectangle(
                    (i - 0.5, place - 0.5),
                    1,
                    1,
                    facecolor=colour,
                    edgecolor="white" if enough else "#bbbbbb",
                    hatch=None if enough else "////",
                    linewidth=0.8,
                )
            )
            text = f"{d.score:.0f}" if d and enough else f"n<{MIN_SAMPLES}"
            dark = d is not None and enough and d.score < 60
            box = None if enough else {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(
                i,
                place,
                text,
                ha="center",
                va="center",
                fontsize=style.FONT_SIZE - 1,
                color="white" if dark else "black",
                bbox=box,
            )
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(bands) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    labels = [f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in bands]
    axes.set_yticks(range(len(bands)), labels)


def draw(data: PlotData) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shown: list[tuple[Series, str, list[DepthScore]]] = []
    hidden = 0
    for series in data.series:
        found = depth_scores(series)
        cells = representative_cells(series.scores, MAX_CELLS)
        shown += [
            (series, cell, own) for cell in cells if (own := [d for d in found if d.cell == cell])
        ]
        hidden += len({d.cell for d in found} - set(cells))
    lengths = sorted({d.context_length for _, _, own in shown for d in own})
    bands = _bands([d for _, _, own in shown for d in own])
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    width = columns * max(0.62 * len(lengths) + 0.5, 2.0) + 1.4
    figure, axes = style.new_figure(
        rows, columns, width, rows * (0.28 * len(bands) + 0.9) + 0.9, sharex=True, sharey=True
    )
    grid = [a for row in axes for a in row]
    for axis, (series, cell, own) in zip(grid, shown, strict=False):
        _draw_panel(axis, own, lengths, bands)
        axis.set_title(style.wrap_label(data.title(pretty_cell(cell), series)))
    for axis in grid[len(shown) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("Depth of the needle (%)")
    for axis in axes[-1]:
        axis.set_xlabel("Context length (tokens)")
    scale = ScalarMappable(Normalize(0, 100), colormaps["viridis"])
    figure.colorbar(scale, ax=grid, label="Score (0 to 100)", fraction=0.05, aspect=30)
    caption = f"Hatched: fewer than {MIN_SAMPLES} samples that the method itself answered."
    if hidden:
        caption += f" {hidden} more cells are in the CSV; drawn are cells from best to worst."
    style.finish(figure, "Single needle by depth and length", data.warnings, caption)
    return figure
