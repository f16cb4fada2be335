"""Accuracy against throughput, with the Pareto frontier where the intervals establish one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from shadowkv_cli.frontier import (
    Doubt,
    FrontierPoint,
    doubt_between,
    panels,
    pareto_front,
    point_doubts,
    reason,
    unresolved_pairs,
)
from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import SHORT_NAMES, PlotData, setting, sort_key
from shadowkv_cli.rowlog import Row
from shadowkv_cli.summary import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("sparse_budget", "rank", "chunk_size", "landmarks_per_chunk")
LABEL_EVERY_POINT_UP_TO = 6


def unavailable(data: PlotData) -> str | None:
    if not data.joined:
        return "needs accuracy and throughput of the same cells (a sweep, or an eval and a bench)"
    return None


def points(data: PlotData) -> list[Row]:
    rows = []
    for joined in data.joined:
        for panel in panels(joined.points).values():
            front = [] if joined.random_weights else pareto_front(panel)
            doubts = point_doubts(panel)
            for p in panel:
                rows.append(
                    {
                        "run": joined.label,
                        "cell": p.cell,
                        "method": p.method,
                        **{name: p.settings.get(name) for name in AXES},
                        "budget_tokens": p.budget_tokens,
                        "score": p.score.estimate,
                        "score_low": p.score.low,
                        "score_high": p.score.high,
                        "score_context_length": p.score_length,
                        "n": p.score.n,
                        "tokens_per_s": p.tokens_per_s.estimate,
                        "tokens_per_s_low": p.tokens_per_s.low,
                        "tokens_per_s_high": p.tokens_per_s.high,
                        "throughput_context_length": p.context_length,
                        "batch_rule": p.batch_rule,
                        "batch_size": p.batch_size,
                        "tested": p.tested,
                        "on_frontier": p in front,
                        "order_not_established": p in front and id(p) in doubts,
                        "hit_rates_differ": p.hit_rates_differ,
                    }
                )
    return rows


class Looks:
    """Which setting is shown by colour, marker, size and filling: only those that vary."""

    def __init__(self, cells: list[FrontierPoint]) -> None:
        self.values = {
            name: sorted({setting(p, name) for p in cells} - {None}, key=sort_key) for name in AXES
        }
        self.methods = list(dict.fromkeys(p.method for p in cells))
        self.varying = [name for name in AXES if len(self.values[name]) > 1]
        self.colour_of = "sparse_budget" if "sparse_budget" in self.varying else "method"
        shapes = list(dict.fromkeys((p.method, setting(p, "chunk_size")) for p in cells))
        self.shows_chunks = "chunk_size" in self.varying and len(shapes) <= len(style.MARKERS)
        self.shapes = list(dict.fromkeys(self._shape(p) for p in cells))

    def _shape(self, point: FrontierPoint) -> tuple[str, Any]:
        """What the marker stands for: the method and, where markers suffice, its chunk size."""
        return point.method, setting(point, "chunk_size") if self.shows_chunks else None

    def _index(self, point: FrontierPoint, name: str) -> int:
        if name == "method":
            return self.methods.index(point.method)
        value = setting(point, name)
        return self.values[name].index(value) if value in self.values[name] else 0

    def look(self, point: FrontierPoint) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` for the marker of a point."""
        if self.colour_of == "method":
            colour = style.OKABE_ITO[self._index(point, "method") % len(style.OKABE_ITO)]
        else:
            shades = style.colours(len(self.values["sparse_budget"]))
            colour = shades[self._index(point, "sparse_budget")]
        size = 6.0
        if "rank" in self.varying:
            size = 4.5 + 5 * self._index(point, "rank") / (len(self.values["rank"]) - 1)
        hollow = "landmarks_per_chunk" in self.varying and not self._index(
            point, "landmarks_per_chunk"
        )
        return {
            "marker": style.MARKERS[self.shapes.index(self._shape(point)) % len(style.MARKERS)],
            "markersize": size,
            "color": colour,
            "markerfacecolor": "white" if hollow else colour,
        }

    def name(self, point: FrontierPoint) -> str:
        """What tells a point from the others, short: `b 64, r 32, c 8`."""
        letters = {"sparse_budget": "b", "rank": "r", "chunk_size": "c", "landmarks_per_chunk": "L"}
        parts = [point.method] if len(self.methods) > 1 else []
        for name in self.varying:
            if (value := setting(point, name)) is not None:
                parts.append(f"{letters[name]} {value}")
        return ", ".join(parts) or point.method

    def handles(self, cells: list[FrontierPoint]) -> list[Any]:
        """Legend entries: one per marker, and one per value of every other setting shown."""
        from matplotlib.lines import Line2D

        handles = []
        for shape in self.shapes if len(self.shapes) > 1 or not self.varying else []:
            look = self.look(next(p for p in cells if self._shape(p) == shape))
            colour = look["color"] if self.colour_of == "method" else style.GREY
            look |= {"color": colour, "markerfacecolor": colour, "markersize": 6.0}
            handles.append(Line2D([], [], linestyle="none", label=self._shape_name(shape), **look))
        for name in (n for n in self.varying if n != "chunk_size"):
            for value in self.values[name]:
                look = self.look(next(p for p in cells if setting(p, name) == value))
                hollow = look["markerfacecolor"] == "white" and name == "landmarks_per_chunk"
                colour = look["color"] if name == self.colour_of else style.GREY
                look |= {"marker": "o", "color": colour}
                look |= {"markerfacecolor": "white" if hollow else colour}
                if name != "rank":
                    look |= {"markersize": 6.0}
                label = f"{SHORT_NAMES.get(name, name)} {value}"
                handles.append(Line2D([], [], linestyle="none", label=label, **look))
        return handles

    def _shape_name(self, shape: tuple[str, Any]) -> str:
        method, chunk_size = shape
        several = sum(other == method for other, _ in self.shapes) > 1
        if not several:
            return method
        chunk = f"chunk {chunk_size}"
        return f"{method}, {chunk}" if len(self.methods) > 1 else chunk


def _doubts(panel: list[FrontierPoint]) -> set[Doubt]:
    return {doubt for *_, doubt in unresolved_pairs(panel)}


def has_frontier(panel: list[FrontierPoint], random_weights: bool) -> bool:
    """Whether a frontier may be drawn: at least one of its steps is established."""
    steps = list(itertools.pairwise(pareto_front(panel)))
    established = any(doubt_between(a, b) is None for a, b in steps) if steps else True
    return not random_weights and established and (bool(steps) or not unresolved_pairs(panel))


def _draw_front(axes: Axes, panel: list[FrontierPoint]) -> None:
    """Draw the stairs of the frontier, dotted where the order is not established."""
    for a, b in itertools.pairwise(pareto_front(panel)):
        x = [a.tokens_per_s.estimate, a.tokens_per_s.estimate, b.tokens_per_s.estimate]
        y = [a.score.estimate, b.score.estimate, b.score.estimate]
        line = ":" if doubt_between(a, b) else "-"
        axes.plot(x, y, line, color=style.VERMILLION, linewidth=1.5, zorder=2)


def _draw_panel(
    axes: Axes, title: str, panel: list[FrontierPoint], looks: Looks, random: bool
) -> list[FrontierPoint]:
    """Draw everything but the labels; returns the points to label."""
    shown = [p for p in panel if p.tested]
    for p in shown:
        x, y = p.tokens_per_s, p.score
        look = looks.look(p) if p.method != FULL else {"marker": "*", "color": style.BLACK}
        if p.method == FULL:
            look |= {"markersize": 11}
            axes.axhline(y.estimate, color=style.BLACK, linestyle="--", linewidth=0.8, zorder=1)
            axes.axvline(x.estimate, color=style.BLACK, linestyle="--", linewidth=0.8, zorder=1)
        axes.errorbar(
            x.estimate,
            y.estimate,
            xerr=[[x.estimate - x.low], [x.high - x.estimate]],
            yerr=[[y.estimate - y.low], [y.high - y.estimate]],
            ecolor="#b0b0b0",
            elinewidth=0.7,
            capsize=1.5,
            linestyle="none",
            zorder=4,
            **look,
        )
    axes.margins(0.12, 0.1)
    axes.set_xlabel("Decode throughput (tokens/s)")
    length = shown[0].score_length if shown else None
    where = f"at {length:,} tokens" if length else "over all lengths"
    axes.set_ylabel(f"Score (0 to 100), task average {where}")
    message = ""
    if random:
        message = "Random weights: no frontier is drawn."
    elif has_frontier(panel, random):
        _draw_front(axes, panel)
    else:
        message = (
            f"No frontier: {reason(_doubts(panel))}\ndo not establish the order of its neighbours."
        )
    style.message_above(axes, title, message)
    cells = [p for p in shown if p.method != FULL]
    if len(cells) <= LABEL_EVERY_POINT_UP_TO:
        return cells
    return [p for p in pareto_front(panel) if p in cells] if not message else []


def _rounds_text(shown: list[FrontierPoint]) -> str:
    """What the bars of the speed are; under 6 rounds what they cover, too."""
    text = "interval of the median over the rounds"
    covered = {p.tokens_per_s.confidence for p in shown if p.tokens_per_s.confidence < 0.95}
    if covered:
        least, most = (f"{100 * bound:.0f}" for bound in (min(covered), max(covered)))
        span = least if least == most else f"{least} to {most}"
        text += f", of fewer than 6 their whole range, which covers {span}\u00a0%"
    return text


def draw(data: PlotData) -> Figure:
    from matplotlib.lines import Line2D

    groups = [(j, key, p) for j in data.joined for key, p in panels(j.points).items()]
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    figure, axes = style.new_figure(rows, columns, 4.0 * columns + 1.8, 3.6 * rows + 0.5)
    grid = [a for row in axes for a in row]
    shown = [p for _, _, panel in groups for p in panel if p.tested]
    cells = [p for p in shown if p.method != FULL]
    looks = Looks(cells)
    drawn = []
    for axis, (joined, (length, rule), panel) in zip(grid, groups, strict=False):
        sizes = sorted({p.batch_size for p in panel})
        batch = f"batch {sizes[0]}" if len(sizes) == 1 else f"batch {sizes[0]} to {sizes[-1]}"
        rule = "" if rule.isdigit() else f" ({rule})"
        title = data.title(f"{length:,} tokens of context, {batch}{rule}", joined)
        drawn.append((axis, panel, _draw_panel(axis, title, panel, looks, joined.random_weights)))
    for axis in grid[len(groups) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], linestyle="none", marker="*", markersize=10, color=style.BLACK)]
    handles[0].set_label("full attention")
    handles += looks.handles(cells)
    fronts = [panel for joined, _, panel in groups if has_frontier(panel, joined.random_weights)]
    if fronts:
        handles.append(Line2D([], [], color=style.VERMILLION, label="Pareto frontier"))
        label = "order not established"
        handles.append(Line2D([], [], color=style.VERMILLION, linestyle=":", label=label))
    style.legend_outside(figure, handles)
    untested = len({p.cell for _, _, panel in groups for p in panel if not p.tested})
    caption = f"Bars: 95 % interval of the score; {_rounds_text(shown)}."
    if doubts := {doubt for panel in fronts for doubt in _doubts(panel)}:
        caption += f" Dotted: {reason(doubts)} do not establish the order."
    letters = {"sparse_budget": "b budget", "rank": "r rank", "chunk_size": "c chunk size"}
    named = [letters.get(name, "L landmarks per chunk") for name in looks.varying]
    if named and any(labelled for _, _, labelled in drawn):
        caption += f" Labels: {', '.join(named)}."
    if untested:
        caption += f" {untested} cells not tested (prompts not longer than what they keep)."
    style.finish(figure, "Accuracy against decode throughput", data.warnings, caption)
    for axis, panel, labelled in drawn:
        places = [(p.tokens_per_s.estimate, p.score.estimate) for p in panel if p.tested]
        labels = [(p.tokens_per_s.estimate, p.score.estimate, looks.name(p)) for p in labelled]
        style.place_labels(axis, labels, places)
    return figure
