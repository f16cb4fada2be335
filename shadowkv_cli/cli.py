"""The `shadowkv` command: registers one module a command and turns errors into one line each."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from shadowkv_cli import __version__
from shadowkv_cli.commands import build_data, models
from shadowkv_cli.commands.bench import bench
from shadowkv_cli.commands.doctor import doctor
from shadowkv_cli.commands.eval import eval_command
from shadowkv_cli.commands.plot import plot
from shadowkv_cli.commands.score import score
from shadowkv_cli.commands.spectrum import spectrum
from shadowkv_cli.commands.sweep import sweep
from shadowkv_cli.console import notice
from shadowkv_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, ShadowKVError


class InOrderOfUse(TyperGroup):
    """Lists the commands in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = ["build-data", "eval", "score", "bench", "sweep", "plot"]
        order += ["spectrum", "models", "doctor"]
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    name="shadowkv",
    cls=InOrderOfUse,
    help="Measure what ShadowKV costs in accuracy and buys in throughput.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(build_data.app, name="build-data")
app.command("eval", short_help="Score methods on a dataset.")(eval_command)
app.command(short_help="Score stored predictions again.")(score)
app.command(short_help="Time the decoding of methods.")(bench)
app.command(short_help="Accuracy and throughput of a grid of settings.")(sweep)
app.command(short_help="Draw figures from the folders of runs.")(plot)
app.command(short_help="Energy of the keys that each rank keeps.")(spectrum)
app.add_typer(models.app, name="models", short_help="List known models; fetch one.")
app.command()(doctor)

RESUMABLE = {"build-data", "eval", "sweep", "bench"}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show Python's traceback when something fails.")
    ] = False,
) -> None:
    """Measure what ShadowKV costs in accuracy and buys in throughput.

    Example: shadowkv build-data ruler --tokenizer demo --context-length 4k --output datasets/demo
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def describe_usage(error: TyperException) -> str:
    """One line for a command line that does not parse: the value, or where to read on."""
    message = error.format_message().replace("Value error, ", "").replace("Input should", "must")
    reasons: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    if reasons and f"'{reasons[0]['input']}'" not in message:
        return f"{message.split(', unable')[0]}, not '{reasons[0]['input']}'."
    context = getattr(error, "ctx", None)
    if reasons or context is None or "Did you mean" in message or "Possible" in message:
        return message
    return f"{message.rstrip('.')}: see `{context.command_path} --help`."


def describe_failure(error: BaseException) -> str | None:
    """One line for failures that are not ours but have a known way out; None for any other."""
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    ):
        return "Out of memory: use a shorter context, a smaller batch, or --dtype bfloat16."
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        if where.endswith(".tmp"):  # of a file that is replaced in one step
            where = f" {Path(error.filename).parent}"
        if error.errno == errno.ENOSPC:
            return (
                f"The disk is full{where}: free space and run the same command again; "
                "what was finished is kept."
            )
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return f"No permission to write{where}: choose another --output."
        if error.errno is not None:
            return f"{error.strerror}{where}."
    return None


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see the README for what each code means."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        code = typer.main.get_command(app).main(
            args=args, prog_name="shadowkv", standalone_mode=False
        )
    except (ShadowKVError, TyperException) as error:
        if debug:
            raise
        notice(f"shadowkv: {describe_usage(error) if isinstance(error, TyperException) else error}")
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        known = describe_failure(error)
        notice(f"shadowkv: {known or f'unexpected {type(error).__name__}: {error}'}")
        if known is None:
            notice("This is a bug; run again with --debug for the traceback.")
        return EXIT_FAILED
    if code == EXIT_INTERRUPTED:
        resumes = any(a in RESUMABLE for a in args[:1])
        more = (
            ": what was finished is saved; run the same command again to continue"
            if resumes
            else ""
        )
        notice(f"Interrupted{more}.")
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the installed `shadowkv` script."""
    code = run()
    # What is left is the end of worker processes; an impatient Ctrl-C would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
