"""shadowkv doctor --probe"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shadowkv_cli.config import split_list
from shadowkv_cli.console import notice, print_json
from shadowkv_cli.diagnosis import REQUIREMENTS, Check, run_checks
from shadowkv_cli.errors import EXIT_FAILED, unknown_name
from shadowkv_cli.options import ConfigOption, JsonOption, OfflineOption


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require", metavar="cuda,kernels,hub", help="Fail without these; commas or repeats."
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure memory, matrix products and the bus, and keep it."),
    ] = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say what is here, what is missing, and what to do about it.

    Exit code 1 if something that runs need, or that --require names, is missing.

    Example: shadowkv doctor --probe --require cuda
    """
    required = split_list(require or [])
    for name in required:
        if name not in REQUIREMENTS:
            raise unknown_name("requirement", name, REQUIREMENTS)
    checks = run_checks(probe=probe, offline=offline)
    states = {check.name: check.state for check in checks}
    missing = [check.name for check in checks if check.state == "bad"]
    missing += [name for name in required if states[REQUIREMENTS[name]] == "note"]
    if json:
        print_json({"checks": [asdict(check) for check in checks], "missing": missing})
    else:
        _print_checks(checks)
    if missing:
        notice(f"Missing: {', '.join(missing)}.")
        raise typer.Exit(EXIT_FAILED)


def _print_checks(checks: list[Check]) -> None:
    marks = {"ok": "ok", "note": "--", "bad": "!!"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{marks[check.state]}  {check.name:<{width}}  {check.found}")
        if check.advice:
            print(f"    {'':<{width}}  -> {check.advice}")
