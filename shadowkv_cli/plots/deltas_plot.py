"""Difference to full attention, task by task, paired by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, Series, pretty_cell, representative_cells
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 5
GROUP_HEIGHT = 0.8
"""What the bars of one task take of its row."""


def _has_failed(record: ScoreRecord) -> bool:
    """Whether every sample of a method's task failed, so that there is nothing to compare."""
    return record.method != FULL and record.task != AVERAGE and record.score is None


def _compared(series: Series) -> list[ScoreRecord]:
    """Records with a difference, and those of tasks that failed altogether."""
    return [
        r
        for r in series.scores
        if r.context_length is not None
        and r.tested
        and (r.difference is not None or _has_failed(r))
    ]


def _with_differences(data: PlotData) -> list[Series]:
    return [s for s in data.series if any(r.difference for r in _compared(s))]


def unavailable(data: PlotData) -> str | None:
    if not _with_differences(data):
        return "needs scores of full attention and of another method from the same prefills"
    return None


def _shown_cells(series: Series) -> list[str]:
    cells = {r.cell for r in _compared(series)}
    return representative_cells([r for r in series.scores if r.cell in cells], MAX_CELLS)


def points(data: PlotData) -> list[Row]:
    rows = []
    for series in _with_differences(data):
        shown = _shown_cells(series)
        for r in _compared(series):
            difference = r.difference
            rows.append(
                {
                    "run": series.label,
                    "context_length": r.context_length,
                    "task": r.task,
                    "cell": r.cell,
                    "method": r.method,
                    "difference": difference.estimate if difference else None,
                    "difference_low": difference.low if difference else None,
                    "difference_high": difference.high if difference else None,
                    "pairs": difference.n if difference else 0,
                    "differing_predictions": r.differing,
                    "failed": r.failed,
                    "drawn": r.cell in shown,
                }
            )
    return rows


def _look(i: int) -> dict[str, Any]:
    """The marker at the estimates of the i-th cell: without it no bar would show at 0."""
    return {
        "linestyle": "none",
        "marker": style.MARKERS[i],
        "markersize": 5,
        "color": style.OKABE_ITO[i],
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _place(task: int, cell: int, cells: int) -> float:
    """Where on the axis of tasks the bar of a cell stands."""
    return task + (cell - (cells - 1) / 2) * GROUP_HEIGHT / cells


def _draw_panel(axes: Axes, records: list[ScoreRecord], tasks: list[str], cells: list[str]) -> None:
    height = GROUP_HEIGHT / len(cells)
    found = {(r.task, r.cell): r.difference for r in records}
    for i, cell in enumerate(cells):
        places, values, low, high = [], [], [], []
        for j, task in enumerate(tasks):
            interval = found.get((task, cell))
            if interval is not None:
                places.append(_place(j, i, len(cells)))
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
        axes.plot(values, places, zorder=6, **_look(i))
    axes.axvline(0, color=style.BLACK, linewidth=0.9, zorder=5)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    if AVERAGE in tasks[1:]:
        axes.axhline(tasks.index(AVERAGE) - 0.5, color=style.GREY, linewidth=0.6)
    axes.set_xlabel("Points to full attention")


def _mark_failed(
    axes: Axes, records: list[ScoreRecord], tasks: list[str], cells: list[str]
) -> None:
    """Write `failed` in place of a bar, on the roomier side of 0: call it when all is drawn."""
    low, high = axes.get_xlim()
    side = 1 if high >= -low else -1
    for record in (r for r in records if _has_failed(r) and r.cell in cells):
        i = cells.index(record.cell)
        axes.annotate(
            "failed",
            (0, _place(tasks.index(record.task), i, len(cells))),
            xytext=(3 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center_baseline",
            fontsize=style.FONT_SIZE - 1.5,
            color=style.OKABE_ITO[i],
        )


def draw(data: PlotData) -> Figure:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = _with_differences(data)
    cells = {s.label: _shown_cells(s) for s in found}
    lengths = {s.label: sorted({r.context_length or 0 for r in _compared(s)}) for s in found}
    columns = max(len(own) for own in lengths.values())
    tasks = list(dict.fromkeys(r.task for s in found for r in _compared(s) if r.task != AVERAGE))
    if len(tasks) > 1 and any(r.task == AVERAGE for s in found for r in _compared(s)):
        tasks.append(AVERAGE)
    bars = max(len(own) for own in cells.values())
    height = (0.55 + len(tasks) * max(0.13 * bars + 0.08, 0.2)) * len(found) + 0.8
    width = 2.5 * columns + 3.2
    figure, axes = style.new_figure(len(found), columns, width, height, sharex=True, sharey=True)
    handles: list[Any] = []
    panels, hidden = [], 0
    for row, series in zip(axes, found, strict=True):
        names = cells[series.label]
        hidden += len({r.cell for r in _compared(series)}) - len(names)
        for axis, length in zip(row, lengths[series.label], strict=False):
            here = [r for r in _compared(series) if r.context_length == length]
            _draw_panel(axis, here, tasks, names)
            panels.append((axis, here, names))
            counts = {r.difference.n if r.difference else 0 for r in here if r.task != AVERAGE}
            least, most = min(counts), max(counts)
            n = f"{least}" if least == most else f"{least} to {most}"
            axis.set_title(data.title(f"{length:,} tokens, n = {n}", series), loc="left")
        for axis in row[len(lengths[series.label]) :]:
            axis.set_visible(False)
        prefix = f"{series.label}: " if len(found) > 1 else ""
        for i, cell in enumerate(names):
            patch = Patch(
                facecolor=style.OKABE_ITO[i],
                hatch=style.HATCHES[i],
                edgecolor="white",
                label=style.wrap_label(prefix + pretty_cell(cell)),
            )
            handles.append((patch, Line2D([], [], **_look(i))))
    style.legend_outside(figure, handles)
    caption = "Whiskers: 95 % interval of the paired difference (Tango)."
    if any(_has_failed(r) and r.cell in names for _, here, names in panels for r in here):
        caption += " Failed: all samples of the task did, so the method has no average."
    if hidden > 0:
        more = "cell is" if hidden == 1 else "cells are"
        caption += f" {hidden} more {more} in the CSV; those drawn span best to worst."
    style.finish(figure, "Difference to full attention", data.warnings, caption)
    for axis, here, names in panels:
        _mark_failed(axis, here, tasks, names)
    return figure
