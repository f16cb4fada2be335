"""Single needles: score by the needle's depth and the context length."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, Series, pretty_cell, representative_cells
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import chosen_rows, group_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_SAMPLES = 10
BANDS = 5
MAX_CELLS = 6


@dataclass(frozen=True)
class DepthScore:
    """Mean score (0 to 100) of one cell at one length within one band of depths (percent)."""

    cell: str
    context_length: int
    depth_low: float
    depth_high: float
    n: int
    score: float


def depth_scores(series: Series) -> list[DepthScore]:
    """Mean scores of the single-needle rows that the method itself answered, in bands of depth."""
    rows = [
        r for r in series.predictions if r.get("depth") is not None and not r.get("dense_fallback")
    ]
    width = 100 / BANDS
    groups = group_by(
        rows,
        lambda r: (r["cell"], r["context_length"], min(int(r["depth"] / width), BANDS - 1)),
    )
    found = []
    for (cell, length, band), own in groups.items():
        chosen, _ = chosen_rows(own)
        if chosen:
            score = 100 * fmean(row["score"] for row, _ in chosen)
            low = band * width
            found.append(DepthScore(cell, length, low, low + width, len(chosen), score))
    return found


def unavailable(data: PlotData) -> str | None:
    counts = [d.n for s in data.series for d in depth_scores(s)]
    if not counts:
        return "needs single-needle tasks (niah_single_1 to 3), whose rows carry a depth"
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


def _draw_panel(axes: Axes, found: list[DepthScore], lengths: list[int]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = {(d.context_length, round(d.depth_low * BANDS / 100)): d for d in found}
    for i, length in enumerate(lengths):
        for band in range(BANDS):
            d = shown.get((length, band))
            enough = d is not None and d.n >= MIN_SAMPLES
            colour = colormaps["viridis"](d.score / 100) if d and enough else "white"
            axes.add_patch(
                Rectangle(
                    (i - 0.5, band - 0.5),
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
                band,
                text,
                ha="center",
                va="center",
                fontsize=style.FONT_SIZE - 1,
                color="white" if dark else "black",
                bbox=box,
            )
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(BANDS - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    step = 100 // BANDS
    axes.set_yticks(range(BANDS), [f"{i * step} to {(i + 1) * step}" for i in range(BANDS)])


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
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    width = columns * max(0.62 * len(lengths) + 0.5, 2.0) + 1.4
    figure, axes = style.new_figure(
        rows, columns, width, rows * 2.3 + 0.9, sharex=True, sharey=True
    )
    grid = [a for row in axes for a in row]
    for axis, (series, cell, own) in zip(grid, shown, strict=False):
        _draw_panel(axis, own, lengths)
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
