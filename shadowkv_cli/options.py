"""Command-line options that several commands share, declared once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from shadowkv_cli.errors import UsageError


def load_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of this command; the command line wins.

    Raises UsageError for a missing or unreadable file and for a name that the command has not.
    """
    if path is None or ctx.resilient_parsing:
        return path
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"The configuration {path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UsageError(f"The configuration {path} must hold 'option: value' lines.")
    params = {p.name: p for p in ctx.command.params if p.name not in ("config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in params:
            close = difflib.get_close_matches(name, [str(p) for p in params], n=1)
            meant = f" Did you mean '{close[0].replace('_', '-')}'?" if close else ""
            raise UsageError(f"The configuration {path} has an unknown name '{key}'.{meant}")
        many = getattr(params[name], "multiple", False) or params[name].nargs != 1
        items = value if isinstance(value, list) else [value]
        if many:
            defaults[name] = [str(item) for item in items]
        elif isinstance(value, list):
            defaults[name] = ",".join(str(item) for item in items)
        elif isinstance(value, bool) or value is None:
            defaults[name] = value
        else:
            defaults[name] = str(value)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        is_eager=True,
        callback=load_config_file,
        help="Read options from a YAML file with the same names; the command line wins.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with a schema_version on stdout.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run, how much and how long, then stop.")
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="A folder that `build-data` wrote.")
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the hub's repository run its own Python code."),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use only what is on this machine; contact no hub.")
]
TasksOption = Annotated[
    list[str] | None, typer.Option("--tasks", help="Only these tasks; commas or repeats.")
]
