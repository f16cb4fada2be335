"""A captured decode step by phase: what works beside the rest on bars of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, Series, different_settings
from shadowkv_cli.rowlog import Row
from shadowkv_cli.run_config import ANY_KERNEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = {
    "dense": ("matrix products", "layer ops"),
    "select": ("select",),
    "residency": ("residency", "misses"),
    "attention": ("attention",),
    "other": ("other",),
    "fetch": ("fetch",),
    "rebuild": ("rebuild",),
    "counts, drift": ("beside",),
}
"""Phases as they are drawn, and those of the rows that each is made of."""

HATCHES = dict(zip(PHASES, ("", "////", "xxxx", "\\\\\\\\", "", "", "++++", "----"), strict=True))
"""Lines alone: dots would make the SVG ten times as large."""

COLOURS = dict(zip(PHASES, (*style.OKABE_ITO, style.GREY), strict=True))

BESIDE = ("fetch", "rebuild", "counts, drift")
"""On streams of their own, beside other lanes' selection and attention, or beside the model."""

BY_LANE = ("attention", "fetch", "rebuild")
"""Each lane has its own. Earlier rows have the sums of their times."""

_Part = tuple[str, float, float | None, float | None]
"""A phase's name, milliseconds, GB/s and share of the probe; the last two where they are known."""

_Written = tuple[float, float, float, str, list[str]]
"""Left end, middle, width and colour of a bar, and what may be written into it."""

MAX_CELLS = 10
BAR_INCHES, LINE_INCHES, GAP_INCHES = 0.21, 0.135, 0.16


@dataclass(frozen=True)
class _Bar:
    """Phases one after the other."""

    parts: list[_Part]

    @property
    def ms(self) -> float:
        return sum(ms for _, ms, *_ in self.parts)


@dataclass(frozen=True)
class _Step:
    """One measurement whose phases are known."""

    row: Row
    series: Series

    @property
    def key(self) -> tuple[str, int, int]:
        return self.row["cell"], self.row["context_length"], self.row["batch_size"]

    @property
    def phases(self) -> dict[str, float]:
        found = {
            name: sum(self.row["phase_ms"].get(part, 0.0) for part in parts)
            for name, parts in PHASES.items()
        }
        return {name: ms for name, ms in found.items() if ms}

    def gb_s(self, phase: str) -> float | None:
        """None where bytes are not known, or times of lanes beside each other were added up."""
        parts = self.row.get("lanes", 1) * self.row.get("micro_batches", 1)
        if phase in BY_LANE and parts > 1 and self.row.get("phase_rule") != ANY_KERNEL:
            return None
        moved = (self.row.get("phase_bytes") or {}).get(phase)
        return moved / self.phases[phase] / 1e6 if moved else None

    def share(self, phase: str) -> float | None:
        """Of what the bus or the memory was probed to reach."""
        probe = self.series.probe
        names = ["memory_read_gb_s"]
        if phase == "fetch":
            names = ["zero_copy_gather_gb_s", "h2d_gb_s"]
        peak = next((probe[name] for name in names if probe.get(name)), None)
        speed = self.gb_s(phase)
        return speed / peak if speed and peak else None

    @property
    def bars(self) -> list[_Bar]:
        def bar(names: Sequence[str]) -> _Bar:
            return _Bar(
                [
                    (name, self.phases[name], self.gb_s(name), self.share(name))
                    for name in names
                    if name in self.phases
                ]
            )

        tracks = [[name for name in PHASES if name not in BESIDE], *([name] for name in BESIDE)]
        return [found for found in map(bar, tracks) if found.parts]


def _steps(series: Series) -> list[_Step]:
    """The first measurement with phases of each cell, length and batch size."""
    found: dict[tuple[str, int, int], _Step] = {}
    for row in series.measurements:
        if row.get("error") is None and row.get("phase_ms"):
            step = _Step(row, series)
            found.setdefault(step.key, step)
    return list(found.values())


def unavailable(data: PlotData) -> str | None:
    if any(_steps(series) for series in data.series):
        return None
    return "needs a bench on a GPU with the compiled kernels: its rows have a step's phases"


def points(data: PlotData) -> list[Row]:
    rows = []
    for series in data.series:
        for place, step in enumerate(_steps(series)):
            row = step.row
            for phase, ms in step.phases.items():
                rows.append(
                    {
                        "run": series.label,
                        "cell": row["cell"],
                        "method": row["method"],
                        "context_length": row["context_length"],
                        "batch_size": row["batch_size"],
                        "lanes": row.get("lanes"),
                        "hit_rate": row.get("hit_rate"),
                        "step_ms_p50": row["step_ms_p50"],
                        "phase": phase,
                        "beside": phase in BESIDE,
                        "ms": ms,
                        "gb_s": step.gb_s(phase),
                        "share_of_probe": step.share(phase),
                        "drawn": place < MAX_CELLS,
                    }
                )
    return rows


def _labels(steps: Sequence[_Step]) -> list[str]:
    """What tells the drawn steps apart, wrapped."""
    names, _ = different_settings([step.row["cell"] for step in steps])
    lengths = len({step.row["context_length"] for step in steps}) > 1
    found = []
    for step, name in zip(steps, names, strict=True):
        where = f", {step.row['context_length']:,} tokens" if lengths else ""
        text = f"{'full attention' if name == 'full' else name}{where}, batch\u00a0"
        found.append(style.wrap_label(f"{text}{step.row['batch_size']}", 30))
    return found


def _texts(part: _Part) -> list[str]:
    """What may stand in a bar, the longest first."""
    name, ms, gb_s, share = part
    texts = [f"{name} {ms:.1f}", f"{ms:.1f}"]
    if gb_s and share:
        speed = f"{gb_s:,.0f} GB/s, {100 * share:.0f} %"
        texts = [f"{name} {ms:.1f} ms, {speed}", f"{ms:.1f} ms, {100 * share:.0f} %", *texts]
    return texts


def _write_in_bars(axes: Axes, wanted: Sequence[_Written]) -> None:
    """Write into each bar the longest of its texts that fits."""
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for left, y, width, colour, texts in wanted:
        ends = axes.transData.transform([(left, y), (left + width, y)])
        room = 0.93 * (ends[1][0] - ends[0][0]) - 4
        dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), style.rgb(colour), strict=True)) < 0.5
        for text in texts:
            label = axes.text(
                left + width / 2,
                y,
                text,
                ha="center",
                va="center",
                fontsize=style.FONT_SIZE - 1,
                color="white" if dark else "black",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
            )
            label.set_in_layout(False)
            if label.get_window_extent(renderer).width <= room:
                break
            label.remove()


def _draw_steps(axes: Axes, steps: Sequence[_Step], inches: Sequence[float]) -> list[_Written]:
    """Draw every step, from the top; returns what `_write_in_bars` wants."""
    top, ticks = 0.0, []
    inside: list[_Written] = []
    for step, height in zip(steps, inches, strict=True):
        middle = top + height / 2
        bars = step.bars
        first = middle - BAR_INCHES * (len(bars) - 1) / 2
        for i, bar in enumerate(bars):
            left, y = 0.0, first + i * BAR_INCHES
            for part in bar.parts:
                colour = COLOURS[part[0]]
                axes.barh(
                    y,
                    part[1],
                    left=left,
                    height=BAR_INCHES * 0.92,
                    color=colour,
                    hatch=HATCHES[part[0]],
                    edgecolor="white",
                    linewidth=0.4,
                )
                inside.append((left, y, part[1], colour, _texts(part)))
                left += part[1]
        wall, reach = step.row["step_ms_p50"], BAR_INCHES * len(bars) / 2
        axes.plot([wall, wall], [middle - reach, middle + reach], color=style.BLACK, linewidth=2)
        axes.annotate(
            f"{wall:.1f} ms",
            (max(wall, *(bar.ms for bar in bars)), middle),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            weight="bold",
        )
        ticks.append(middle)
        top += height
    axes.set_yticks(ticks, _labels(steps))
    axes.set_ylim(top, 0)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.14 * max(max(s.row["step_ms_p50"], *(b.ms for b in s.bars)) for s in steps))
    axes.set_xlabel("Milliseconds of kernels in one step")
    return inside


def draw(data: PlotData) -> Figure:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = [(s, steps) for s in data.series if (steps := _steps(s)[:MAX_CELLS])]
    heights = [
        [
            GAP_INCHES + max(BAR_INCHES * len(step.bars), LINE_INCHES * (label.count("\n") + 1))
            for step, label in zip(steps, _labels(steps), strict=True)
        ]
        for _, steps in found
    ]
    figure, axes = style.new_figure(
        len(found),
        1,
        8.6,
        sum(map(sum, heights)) + 0.9 * len(found),
        height_ratios=[sum(inches) for inches in heights],
    )
    inside = []
    for (axis,), (series, steps), inches in zip(axes, found, heights, strict=True):
        inside.append((axis, _draw_steps(axis, steps, inches)))
        lengths = {step.row["context_length"] for step in steps}
        title = f"{lengths.pop():,} tokens of context" if len(lengths) == 1 else ""
        axis.set_title(data.title(title, series), loc="left")
    handles: list[Any] = [
        Patch(facecolor=COLOURS[name], hatch=HATCHES[name], edgecolor="white", label=name)
        for name in PHASES
        if any(name in step.phases for _, steps in found for step in steps)
    ]
    handles.append(Line2D([], [], color=style.BLACK, linewidth=2, label="a step, by the clock"))
    style.legend_outside(figure, handles)
    common = [different_settings([step.row["cell"] for step in steps])[1] for _, steps in found]
    caption = (
        "How long any kernel of a phase runs in a captured step. Phases run beside each other, so "
        "all together may take longer than the step; a fetch that waits for its turn counts. GB/s: "
        "bytes that a phase must move once; percent: of what the memory, for fetch the bus, was "
        "probed to reach."
    )
    for shared in dict.fromkeys(filter(None, common)):
        caption += f" All of ShadowKV: {shared}."
    style.finish(figure, "A decode step by phase", data.warnings, caption)
    for axis, wanted in inside:
        _write_in_bars(axis, wanted)
    return figure
