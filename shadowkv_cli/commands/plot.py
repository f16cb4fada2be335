"""shadowkv plot results/demo-sweep --plots frontier,parameters"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shadowkv_cli.console import notice, print_json, print_table
from shadowkv_cli.option_groups import given_names
from shadowkv_cli.options import ConfigOption, JsonOption


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders that eval, bench or sweep wrote.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Where to; RUN/plots if left out."),
    ] = None,
    plots: Annotated[
        list[str] | None,
        typer.Option("--plots", metavar="PLOT[,…]", help="Only these plots; commas or repeats."),
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Say which plots the data allow, and draw nothing.")
    ] = False,
    dpi: Annotated[
        int, typer.Option(metavar="N", min=50, max=1200, help="Dots per inch of the PNG.")
    ] = 200,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Draw figures from the folders of runs: PNG, SVG and the CSV of the points.

    Example: shadowkv plot results/demo-sweep --plots frontier,parameters
    """
    from shadowkv_cli.plotting import PLOTS, available, default_output, draw_plots
    from shadowkv_cli.results import read_run

    read = [read_run(run) for run in runs]
    if show_list:
        reasons = available(read)
        if json:
            print_json({"plots": reasons})
            return
        rows = [[name, PLOTS[name][1], why or "yes"] for name, why in reasons.items()]
        print_table("Plots", ["plot", "shows", "possible"], rows)
        return
    names = None if plots is None else given_names(plots, "--plots")
    files, skipped = draw_plots(read, output or default_output(read), names, dpi)
    if json:
        print_json({"files": [str(file) for file in files], "skipped": skipped})
        return
    for name, why in skipped.items():
        notice(f"{name}: not drawn, {why}.")
    for file in files:
        print(file)
