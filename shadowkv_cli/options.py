"""Command-line options that several commands share, declared once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from shadowkv_cli.errors import UsageError


def load_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of this command; the command line wins.

    Raises UsageError for a missing or unreadable file, for a name that the command has not and for
    one that is given twice.
    """
    if path is None or ctx.resilient_parsing:
        return path
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"The configuration {path} is not valid YAML: {reason}") from None
    if not isinstance(values, dict | None):
        raise UsageError(f"The configuration {path} must hold 'option: value' lines.")
    # A mapping takes the last of equal keys and forgets the others.
    seen: set[str] = set()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        name = str(key.value).replace("-", "_")
        if name in seen:
            raise UsageError(
                f"The configuration {path} gives '{key.value}' twice: keep one of them."
            )
        seen.add(name)
    params = {_config_name(p): p for p in ctx.command.params if p.name not in ("config", "help")}
    defaults: dict[str, Any] = {}
    for key, value in (values or {}).items():
        name = str(key).replace("-", "_")
        if name not in params:
            close = difflib.get_close_matches(name, list(params), n=1)
            meant = f" Did you mean '{close[0].replace('_', '-')}'?" if close else ""
            raise UsageError(f"The configuration {path} has an unknown name '{key}'.{meant}")
        if value is not None:
            defaults[str(params[name].name)] = _config_value(params[name], value, f"{path}: {key}")
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _config_name(param: Any) -> str:
    """A parameter's name in a file: that of its long option; of an argument its own."""
    long = next((opt for opt in param.opts if opt.startswith("--")), str(param.name))
    return str(long.removeprefix("--").replace("-", "_"))


def _config_value(param: Any, value: Any, where: str) -> Any:
    """A value of the file as the command line would give it. Raises UsageError for another type."""
    many = getattr(param, "multiple", False) or param.nargs != 1
    flag = getattr(param, "is_flag", False)
    if flag and not isinstance(value, bool):
        raise UsageError(f"{where} must be true or false, not '{value}'.")
    items = value if isinstance(value, list) else [value]
    if not many and isinstance(value, list):
        raise UsageError(f"{where} takes one value, not a list.")
    for item in items:
        if isinstance(item, dict | list | None):
            raise UsageError(f"{where} holds '{item}': write plain values, or a list of them.")
        if isinstance(item, bool) and not flag:
            raise UsageError(f"{where} is no flag: it cannot be {str(item).lower()}.")
    if flag:
        return value
    return [str(item) for item in items] if many else str(value)


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
TokenizerOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|PATH|demo|smollm2",
        help="Tokenizer of the model that will read the prompts.",
    ),
]
TokenizerRevisionOption = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit of the tokenizer on the hub."),
]
TemplateOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Chat template: auto (the tokenizer's own, or none), base, llama-3, glm, …",
    ),
]
DatasetOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the dataset.")]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="TASK[,…]", help="Only these tasks; commas or repeats."),
]
