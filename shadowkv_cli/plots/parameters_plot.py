"""Accuracy against each setting of a sweep, the others held at one baseline cell's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import SHORT_NAMES, PlotData, Series, is_share, setting, sort_key
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import AVERAGE, FULL, ScoreRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARAMETERS = {
    "sparse_budget": "Sparse budget (tokens)",
    "rank": "Rank of the keys",
    "chunk_size": "Chunk size (tokens)",
    "landmarks_per_chunk": "Landmarks per chunk",
    "outlier_chunks": "Outlier chunks",
    "value_dtype": "Values kept in",
    "landmark_dtype": "Landmarks kept in",
}


def _averages(series: Series) -> list[ScoreRecord]:
    """One record per tested cell: its average over everything that was measured."""
    last = {record.cell: record for record in series.scores if record.task == AVERAGE}
    return [r for r in last.values() if r.score and r.tested]


def _varying(records: list[ScoreRecord]) -> list[str]:
    """Settings with at least two values within one method."""
    return [
        name
        for name in PARAMETERS
        if any(
            len({setting(r, name) for r in records if r.method == method} - {None}) > 1
            for method in {r.method for r in records}
        )
    ]


def _differs_only_in(a: ScoreRecord, b: ScoreRecord, name: str) -> bool:
    return {k: v for k, v in a.settings.items() if k != name} == {
        k: v for k, v in b.settings.items() if k != name
    }


def baseline(records: list[ScoreRecord]) -> ScoreRecord:
    """The cell of one method that most other cells differ from in one setting only.

    In a full grid all do equally: then the one nearest to the middle value of every setting.
    """
    names = _varying(records)
    values = {n: sorted({setting(r, n) for r in records}, key=sort_key) for n in names}

    def rank(record: ScoreRecord) -> tuple[int, float]:
        neighbours = sum(_differs_only_in(record, r, n) for r in records for n in names)
        distance = sum(
            abs(values[n].index(setting(record, n)) - (len(values[n]) - 1) / 2) for n in names
        )
        return -neighbours, distance

    return min(records, key=rank)


def unavailable(data: PlotData) -> str | None:
    if not any(_varying(_averages(s)) for s in data.with_scores):
        return "needs scores of one method with two values of a setting (a sweep)"
    return None


def _lines(series: Series) -> list[tuple[str, str, list[ScoreRecord]]]:
    """(parameter, method, cells on the line through that method's baseline), ordered by value.

    A method that has the setting with one value only is a line of one cell.
    """
    records = [r for r in _averages(series) if r.method != FULL]
    lines = []
    for name in _varying(records):
        for method in dict.fromkeys(r.method for r in records):
            own = [r for r in records if r.method == method]
            centre = baseline(own)
            line = [r for r in own if _differs_only_in(r, centre, name)]
            if setting(centre, name) is None:
                continue
            line.sort(key=lambda r: sort_key(setting(r, name)))
            lines.append((name, method, line))
    return lines


def points(data: PlotData) -> list[Row]:
    rows = []
    for series in data.with_scores:
        on_line = {(name, r.cell) for name, _, line in _lines(series) for r in line}
        records = _averages(series)
        for name in _varying(records):
            for r in records:
                if setting(r, name) is None or r.score is None:
                    continue
                rows.append(
                    {
                        "run": series.label,
                        "parameter": name,
                        "value": setting(r, name),
                        "cell": r.cell,
                        "method": r.method,
                        "score": r.score.estimate,
                        "score_low": r.score.low,
                        "score_high": r.score.high,
                        "n": r.n,
                        "on_baseline_line": (name, r.cell) in on_line,
                    }
                )
    return rows


def _values(records: list[ScoreRecord], name: str) -> list[Any]:
    return sorted({setting(r, name) for r in records} - {None}, key=sort_key)


def _is_mixed(values: Iterable[Any]) -> bool:
    """Whether some values are tokens and others shares of the prompt, which have no order."""
    return len({is_share(value) for value in values}) > 1


def _axis_label(name: str, values: list[Any]) -> str:
    if _is_mixed(values):
        return "Sparse budget (tokens, or % of the prompt)"
    return "Sparse budget (share of the prompt)" if is_share(values[0]) else PARAMETERS[name]


def _draw_panel(axes: Axes, series: Series, name: str) -> None:
    records = _averages(series)
    values = _values(records, name)
    # The axis is one of steps: settings are powers of two or shares, and often both ends matter.
    place: dict[Any, int] = {value: i for i, value in enumerate(values)}
    full = next((r for r in records if r.method == FULL), None)
    if full and full.score:
        axes.axhline(full.score.estimate, color=style.BLACK, linestyle="--", linewidth=0.9)
        axes.axhspan(full.score.low, full.score.high, color=style.BLACK, alpha=0.07, linewidth=0)
    others = [r for r in records if setting(r, name) is not None and r.score]
    axes.plot(
        [place[setting(r, name)] for r in others],
        [r.score.estimate for r in others if r.score],
        marker="o",
        markersize=3,
        linestyle="none",
        color="#bbbbbb",
        zorder=2,
    )
    methods = list(dict.fromkeys(r.method for r in records if r.method != FULL))
    for parameter, method, line in _lines(series):
        if parameter != name:
            continue
        i = methods.index(method)
        scores = [r.score for r in line if r.score]
        shift = 0.06 * (i - (len(methods) - 1) / 2)
        axes.errorbar(
            [place[setting(r, name)] + shift for r in line],
            [s.estimate for s in scores],
            yerr=[[s.estimate - s.low for s in scores], [s.high - s.estimate for s in scores]],
            color=style.OKABE_ITO[i % len(style.OKABE_ITO)],
            marker=style.MARKERS[i % len(style.MARKERS)],
            linestyle="none" if _is_mixed(values) else style.LINES[i % len(style.LINES)],
            elinewidth=0.8,
            capsize=2,
            zorder=3,
        )
    axes.set_xticks(range(len(values)), [str(v) for v in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(_axis_label(name, values))


def draw(data: PlotData) -> Figure:
    from matplotlib.lines import Line2D

    found = [(s, _varying(_averages(s))) for s in data.with_scores]
    found = [(s, names) for s, names in found if names]
    columns = max(len(names) for _, names in found)
    width = max(2.3 * columns + 1.9, 5.0)
    figure, axes = style.new_figure(
        len(found), columns, width, 2.7 * len(found) + 0.5, sharey="row"
    )
    methods: dict[str, int] = {}
    held = []
    for row, (series, names) in zip(axes, found, strict=True):
        own = [r for r in _averages(series) if r.method != FULL]
        for i, method in enumerate(dict.fromkeys(r.method for r in own)):
            methods.setdefault(method, i)
            centre = baseline([r for r in own if r.method == method])
            values = [
                f"{SHORT_NAMES.get(n, n)} {setting(centre, n)}"
                for n in names
                if setting(centre, n) is not None
            ]
            held.append(f"{', '.join(values)} ({method})")
        for axis, name in zip(row, names, strict=False):
            _draw_panel(axis, series, name)
        for axis in row[len(names) :]:
            axis.set_visible(False)
        row[0].set_ylabel("Score (0 to 100), average")
        if len(data.series) > 1:
            row[0].set_title(series.label, loc="left")
    handles = [Line2D([], [], color=style.BLACK, linestyle="--", label="full attention")]
    for method, i in methods.items():
        look: dict[str, Any] = {"color": style.OKABE_ITO[i % 7], "marker": style.MARKERS[i % 7]}
        handles.append(Line2D([], [], linestyle=style.LINES[i % 7], label=method, **look))
    grey: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3, "color": "#bbbbbb"}
    handles.append(Line2D([], [], label="all cells", **grey))
    style.legend_outside(figure, handles)
    caption = (
        f"Coloured: one setting varies, the others stay at {'; '.join(dict.fromkeys(held))}. "
        "Bars and band: 95 % interval."
    )
    if any(_is_mixed(_values(_averages(s), name)) for s, names in found for name in names):
        caption += " Not joined: budgets in tokens and in % of the prompt, which have no order."
    style.finish(figure, "Accuracy against each setting", data.warnings, caption)
    return figure
