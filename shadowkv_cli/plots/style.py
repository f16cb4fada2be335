"""How all figures look: readable in grey print and by the colour-blind; always the same bytes."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008); black is kept for full attention.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BLACK, GREY, VERMILLION = "#000000", "#767676", "#D55E00"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")

FONT_SIZE = 8
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE + 0.5,
    "axes.labelsize": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": FONT_SIZE - 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.6,
    # Text stays text in the SVG: it can be searched, and edited to fit a paper.
    "svg.fonttype": "none",
    "svg.hashsalt": "shadowkv",
}


def new_figure(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `width` x `height` inches with a grid of axes; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [list(row) for row in axes]


def rgb(colour: str) -> tuple[float, float, float]:
    """Red, green and blue of a colour, 0 to 1 each."""
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def colours(count: int) -> list[Any]:
    """Ordered colours from viridis, dark to light, without its palest end."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * i / max(count - 1, 1)) for i in range(count)]


def _wrapped(figure: Figure, text: str, width: float, **font: Any) -> list[str]:
    """Break a text into lines of at most `width` pixels as they will be drawn."""
    from matplotlib.font_manager import FontProperties

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    properties = FontProperties(**font)
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and renderer.get_text_width_height_descent(longer, properties, False)[0] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def finish(figure: Figure, title: str, warnings: Sequence[str], caption: str) -> None:
    """Put the title above; below, the warnings in colour and then the caption.

    Room is left for them, so that nothing is cut off. Call it before labels are placed.
    """
    width = figure.get_figwidth() * figure.dpi
    margin, size = 0.08 * figure.dpi, FONT_SIZE - 0.5
    line_height = size * 1.35 / 72 * figure.dpi
    # Hinting makes text up to 5 % wider at another resolution.
    room = 0.93 * (width - 2 * margin)
    blocks = [
        (_wrapped(figure, text, room, size=size, weight=weight), colour, weight)
        for text, colour, weight in (
            (caption, GREY, "normal"),
            (" ".join(warnings), VERMILLION, "bold"),
        )
        if text
    ]
    spacing = 0.3 * line_height
    below = 0.5 * line_height + sum(len(lines) * line_height + spacing for lines, *_ in blocks)
    _make_room_for_legends(figure, below + 3 * line_height)
    height = figure.get_figheight() * figure.dpi
    y = 0.5 * line_height
    for lines, colour, weight in blocks:
        figure.text(
            margin / width,
            y / height,
            "\n".join(lines),
            fontsize=size,
            color=colour,
            weight=weight,
            va="bottom",
            linespacing=1.2,
        )
        y += len(lines) * line_height + spacing
    figure.suptitle(title, x=margin / width, ha="left", fontsize=FONT_SIZE + 2, weight="bold")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, y / height, 1, 1 - y / height))  # type: ignore[call-arg]


def _make_room_for_legends(figure: Figure, others: float) -> None:
    """Make a figure taller whose legends do not fit beside `others` pixels above and below them."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    tallest = max(
        (legend.get_window_extent(renderer).height for legend in figure.legends), default=0
    )
    figure.set_figheight(max(figure.get_figheight(), (tallest + others) / figure.dpi))


def message_above(axes: Axes, title: str, message: str) -> None:
    """The title of one panel, with a message in colour between it and the axes."""
    lines = message.count("\n") + 1 if message else 0
    axes.set_title(title, loc="left", pad=6 + lines * FONT_SIZE * 1.25)
    if message:
        axes.annotate(
            message,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            va="bottom",
            fontsize=FONT_SIZE - 0.5,
            color=VERMILLION,
        )


def legend_outside(figure: Figure, handles: Sequence[Any], title: str = "") -> None:
    """A legend to the right of all axes; the handles of a tuple are drawn on each other, as one."""
    labels = [(h[0] if isinstance(h, tuple) else h).get_label() for h in handles]
    figure.legend(list(handles), labels, loc="outside right upper", title=title or None)


def wrap_label(text: str, width: int = 26) -> str:
    return "\n".join(textwrap.wrap(text, width))


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str]], avoid: Any) -> None:
    """Write labels beside their points so that they cover neither points nor each other.

    Tries positions around each point from near to far and takes the first that is free; where none
    is, the label is left out rather than made unreadable (the CSV has every point).

    Args:
        labels: x, y in data units, and the text.
        avoid: points in data units, [n, 2], that no label may cover.
    """
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    points = axes.transData.transform(avoid)
    taken: list[Any] = []
    spots = [
        (dx * far, dy * far)
        for far in (7, 13, 20, 30)
        for dx, dy in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1.2), (0, -1.2), (1.3, 0), (-1.3, 0))
    ]
    for (x, y, text), (dx, dy) in itertools.product(labels, spots):
        if any(t.get_text() == text for t in axes.texts):
            continue
        label = axes.annotate(
            text,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="bottom" if dy > 0 else "top" if dy < 0 else "center",
            fontsize=FONT_SIZE - 1,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 3},
        )
        label.set_in_layout(False)
        box = label.get_window_extent(renderer).padded(1.5)
        text_box = _text_box(label, renderer)
        inside = frame.contains(text_box.x0, text_box.y0) and frame.contains(
            text_box.x1, text_box.y1
        )
        covers = any(text_box.padded(7).contains(*point) for point in points)
        if not inside or covers or any(box.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(text_box.padded(1))


def _text_box(label: Any, renderer: Any) -> Any:
    """Where the words are, without the line to the point."""
    from matplotlib.text import Text

    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)
