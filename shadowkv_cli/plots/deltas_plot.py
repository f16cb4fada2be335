"""Difference to full attention, task by task, paired by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, Series, pretty_cell, representative_cells
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 5


def _compared(series: Series) -> list[ScoreRecord]:
    return [
        r
        for r in series.scores
        if r.difference is not None and r.tested and r.context_length is not None
    ]


def unavailable(data: PlotData) -> str | None:
    if not any(_compared(s) for s in data.series):
        return "needs scores of full attention and of another method from the same prefills"
    return None


def _shown_cells(series: Series) -> list[str]:
    cells = {r.cell for r in _compared(series)}
    return representative_cells([r for r in series.scores if r.cell in cells], MAX_CELLS)


def points(data: PlotData) -> list[Row]:
    rows = []
    for series in data.series:
        shown = _shown_cells(series) if _compared(series) else []
        for r in _compared(series):
            assert r.difference is not None
            rows.append(
                {
                    "run": series.label,
                    "context_length": r.context_length,
                    "task": r.task,
                    "cell": r.cell,
                    "method": r.method,
                    "difference": r.difference.estimate,
                    "difference_low": r.difference.low,
                    "difference_high": r.difference.high,
                    "pairs": r.difference.n,
                    "differing_predictions": r.differing,
                    "drawn": r.cell in shown,
                }
            )
    return rows


def _draw_panel(axes: Axes, records: list[ScoreRecord], tasks: list[str], cells: list[str]) -> None:
    height = 0.8 / len(cells)
    found = {(r.task, r.cell): r.difference for r in records}
    for i, cell in enumerate(cells):
        places, values, low, high = [], [], [], []
        for j, task in enumerate(tasks):
            interval = found.get((task, cell))
            if interval is not None:
                places.append(j + (i - (len(cells) - 1) / 2) * height)
                values.append(interval.estimate)
                low.append(interval.estimate - interval.low)
                high.append(interval.high - interval.estimate)
        axes.barh(
            places,
            values,
            height * 0.9,
            xerr=[low, high],
            color=style.OKABE_ITO[i],
            hatch=style.HATCHES[i],
            edgecolor="white",
            linewidth=0,
            error_kw={"elinewidth": 0.8, "capsize": 1.8, "ecolor": "#333333"},
            zorder=3,
        )
        # A bar of no length would be invisible: the marker shows that it was measured.
        axes.plot(
            values,
            places,
            linestyle="none",
            marker="|",
            markersize=min(60 * height, 8),
            color=style.OKABE_ITO[i],
            zorder=4,
        )
    axes.axvline(0, color=style.BLACK, linewidth=0.9, zorder=5)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    if AVERAGE in tasks[1:]:
        axes.axhline(tasks.index(AVERAGE) - 0.5, color=style.GREY, linewidth=0.6)
    axes.set_xlabel("Points to full attention")


def draw(data: PlotData) -> Figure:
    from matplotlib.patches import Patch

    found = [s for s in data.series if _compared(s)]
    cells = {s.label: _shown_cells(s) for s in found}
    lengths = {s.label: sorted({r.context_length or 0 for r in _compared(s)}) for s in found}
    columns = max(len(own) for own in lengths.values())
    tasks = list(dict.fromkeys(r.task for s in found for r in _compared(s) if r.task != AVERAGE))
    if len(tasks) > 1:
        tasks.append(AVERAGE)
    bars = max(len(own) for own in cells.values())
    height = (0.55 + len(tasks) * max(0.13 * bars + 0.08, 0.2)) * len(found) + 0.8
    width = 2.5 * columns + 3.2
    figure, axes = style.new_figure(len(found), columns, width, height, sharex=True, sharey=True)
    handles, hidden = [], 0
    for row, series in zip(axes, found, strict=True):
        names = cells[series.label]
        hidden += len({r.cell for r in series.scores if r.method != FULL}) - len(names)
        for axis, length in zip(row, lengths[series.label], strict=False):
            here = [r for r in _compared(series) if r.context_length == length]
            _draw_panel(axis, here, tasks, names)
            counts = sorted({r.difference.n for r in here if r.difference and r.task != AVERAGE})
            n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            axis.set_title(data.title(f"{length:,} tokens, n = {n}", series), loc="left")
        for axis in row[len(lengths[series.label]) :]:
            axis.set_visible(False)
        prefix = f"{series.label}: " if len(found) > 1 else ""
        for i, cell in enumerate(names):
            handles.append(
                Patch(
                    facecolor=style.OKABE_ITO[i],
                    hatch=style.HATCHES[i],
                    edgecolor="white",
                    label=style.wrap_label(prefix + pretty_cell(cell)),
                )
            )
    style.legend_outside(figure, handles)
    caption = "Bars: 95 % interval of the paired difference (Tango)."
    if hidden > 0:
        more = "cell is" if hidden == 1 else "cells are"
        caption += f" {hidden} more {more} in the CSV; those drawn span best to worst."
    style.finish(figure, "Difference to full attention", data.warnings, caption)
    return figure
