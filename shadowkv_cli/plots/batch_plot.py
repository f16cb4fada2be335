"""Decode throughput against batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, Series, different_settings
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import FULL, ThroughputRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 7


def _measured(series: Series) -> list[ThroughputRecord]:
    """One record per tested cell, length and batch size; one under two rules counts once."""
    found: dict[tuple[str, int, int], ThroughputRecord] = {}
    for record in series.throughput:
        if record.tokens_per_s and record.tested:
            key = (record.cell, record.context_length, record.batch_size)
            found.setdefault(key, record)
    return sorted(found.values(), key=lambda r: r.batch_size)


def unavailable(data: PlotData) -> str | None:
    sizes = {r.batch_size for s in data.series for r in _measured(s)}
    if not sizes:
        return "needs throughput (bench, or sweep without --no-throughput)"
    if len(sizes) < 2:
        return f"needs throughput at two batch sizes or more; the only one here is {min(sizes)}"
    return None


def _shown_cells(series: Series) -> list[str]:
    """Full attention and the first cells with most batch sizes."""
    counts: dict[str, int] = {}
    for record in _measured(series):
        counts[record.cell] = counts.get(record.cell, 0) + 1
    methods = {r.cell: r.method for r in series.throughput}
    ranked = sorted(counts, key=lambda cell: (methods[cell] != FULL, -counts[cell]))
    return ranked[:MAX_CELLS]


def points(data: PlotData) -> list[Row]:
    rows = []
    for series in data.series:
        shown = _shown_cells(series)
        for r in _measured(series):
            assert r.tokens_per_s is not None
            rows.append(
                {
                    "run": series.label,
                    "cell": r.cell,
                    "method": r.method,
                    "context_length": r.context_length,
                    "batch_size": r.batch_size,
                    "batch_rule": r.batch_rule,
                    "tokens_per_s": r.tokens_per_s.estimate,
                    "tokens_per_s_low": r.tokens_per_s.low,
                    "tokens_per_s_high": r.tokens_per_s.high,
                    "rounds": r.tokens_per_s.n,
                    "step_ms_p50": r.step_ms_p50,
                    "step_ms_p99": r.step_ms_p99,
                    "drawn": r.cell in shown,
                }
            )
    return rows


def _draw_panel(
    axes: Axes, records: list[ThroughputRecord], cells: list[str], names: Mapping[str, str]
) -> None:
    others = [c for c in cells if not any(r.cell == c and r.method == FULL for r in records)]
    for cell in cells:
        own = [r for r in records if r.cell == cell]
        speeds = [r.tokens_per_s for r in own if r.tokens_per_s]
        if not speeds:
            continue
        i = others.index(cell) if cell in others else -1
        axes.errorbar(
            [r.batch_size for r in own],
            [s.estimate for s in speeds],
            yerr=[[s.estimate - s.low for s in speeds], [s.high - s.estimate for s in speeds]],
            color=style.BLACK if i < 0 else style.OKABE_ITO[i % 7],
            marker="*" if i < 0 else style.MARKERS[i % 7],
            markersize=9 if i < 0 else 5.5,
            linestyle="--" if i < 0 else style.LINES[i % 7],
            elinewidth=0.8,
            capsize=2,
            label=style.wrap_label("full attention" if i < 0 else names[cell]),
        )
    sizes = sorted({r.batch_size for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Batch size (sequences)")


def draw(data: PlotData) -> Figure:
    found = [s for s in data.series if _measured(s)]
    panels = [
        (s, length) for s in found for length in sorted({r.context_length for r in _measured(s)})
    ]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = style.new_figure(rows, columns, 3.2 * columns + 2.2, 2.9 * rows + 0.6)
    grid = [a for row in axes for a in row]
    handles: dict[str, object] = {}
    shown = list(dict.fromkeys(cell for s in found for cell in _shown_cells(s)))
    words, common = different_settings(shown)
    names = dict(zip(shown, words, strict=True))
    for axis, (series, length) in zip(grid, panels, strict=False):
        here = [r for r in _measured(series) if r.context_length == length]
        _draw_panel(axis, here, _shown_cells(series), names)
        axis.set_title(data.title(f"{length:,} tokens of context", series), loc="left")
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for axis in grid[len(panels) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("Decode throughput (tokens/s)")
    style.legend_outside(figure, list(handles.values()))
    states = sorted({r.state for s in found for r in _measured(s)})
    devices = sorted({r.device for s in found for r in _measured(s)})
    caption = f"Median and its interval over the rounds; {', '.join(devices)}"
    state = "; random keys and values" if states == ["synthetic"] else ""
    shared = f" All of ShadowKV: {common}." if common else ""
    style.finish(figure, "Throughput by batch size", data.warnings, f"{caption}{state}.{shared}")
    return figure
