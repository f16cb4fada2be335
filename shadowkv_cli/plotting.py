"""Figures from the folders of runs alone: PNG, SVG and a CSV of the plotted points."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shadowkv_cli.errors import UsageError, unknown_name
from shadowkv_cli.plots import style
from shadowkv_cli.plots.data import PlotData, load
from shadowkv_cli.results import PLOTS as PLOTS_FOLDER
from shadowkv_cli.results import Run, check_writable
from shadowkv_cli.rowlog import write_atomic, write_failure
from shadowkv_cli.summary import csv_text

PLOTS: dict[str, tuple[str, str]] = {
    "frontier": ("frontier_plot", "accuracy against throughput, with the Pareto frontier"),
    "parameters": ("parameters_plot", "accuracy against budget, rank, chunk size and landmarks"),
    "task-deltas": ("deltas_plot", "difference to full attention, task by task"),
    "niah-depth": ("depth_plot", "single needles by depth and context length"),
    "batch": ("batch_plot", "throughput against batch size"),
    "timeline": ("timeline_plot", "a decode step by phase, on a GPU"),
}
"""Name of each plot, its module in `shadowkv_cli.plots`, and what it shows."""


def _module(name: str) -> Any:
    if name not in PLOTS:
        raise unknown_name("plot", name, PLOTS)
    return importlib.import_module(f"shadowkv_cli.plots.{PLOTS[name][0]}")


def available(runs: Sequence[Run]) -> dict[str, str | None]:
    """For every plot None if the runs' data allow it, else what it needs."""
    data = load(runs)
    return {name: _module(name).unavailable(data) for name in PLOTS}


def default_output(runs: Sequence[Run]) -> Path:
    """Where figures go without --output: into the run. Raises UsageError for several runs."""
    if len(runs) > 1:
        raise UsageError("Several runs are drawn together: say with --output DIR where to.")
    return runs[0].path / PLOTS_FOLDER


def draw_plots(
    runs: Sequence[Run], output: Path, names: Sequence[str] | None = None, dpi: int = 200
) -> tuple[list[Path], dict[str, str]]:
    """Draw the named plots, or all that the data allow.

    Args:
        output: folder, made if it is missing; files of the same names are replaced.
        names: None for all that are possible; a named one that is not possible is an error.
        dpi: dots per inch of the PNG.

    Returns:
        The files written, and why each plot that was left out was.

    Raises:
        UsageError: unknown plot, one that the data do not allow, no plot possible at all, or an
            output that cannot be written to.
    """
    check_writable(output)
    data = load(runs)
    wanted = list(names) if names else list(PLOTS)
    reasons = {name: _module(name).unavailable(data) for name in wanted}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if names and skipped:
        raise UsageError(" ".join(f"The plot '{n}' {why}." for n, why in skipped.items()))
    if len(skipped) == len(wanted):
        raise UsageError("These runs allow no plot yet: `shadowkv plot RUN --list` says why.")
    files: list[Path] = []
    for name in wanted:
        if name not in skipped:
            files += _write(name, data, output, dpi)
    return files, skipped


def _write(name: str, data: PlotData, output: Path, dpi: int) -> list[Path]:
    """Draw one plot and write its three files; the same data give the same bytes."""
    import matplotlib

    module = _module(name)
    contents: dict[str, bytes] = {}
    with matplotlib.rc_context(style.RC):
        figure = module.draw(data)
        for suffix, metadata in (("png", {"Software": "shadowkv"}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=dpi, metadata=metadata)
            contents[suffix] = buffer.getvalue()
    contents["csv"] = csv_text(module.points(data)).encode("utf-8")
    files = []
    for suffix, content in contents.items():
        file = output / f"{name}.{suffix}"
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failure(output, error) from error
        write_atomic(file, content)
        files.append(file)
    return files
