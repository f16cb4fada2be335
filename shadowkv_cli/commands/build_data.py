"""shadowkv build-data ruler|niah|longbench|longbench-v2 …"""

from __future__ import annotations

import typer

from shadowkv_cli.commands.build_longbench import longbench, longbench_v2
from shadowkv_cli.commands.build_ruler import niah, ruler

app = typer.Typer()


@app.callback(invoke_without_command=True)
def build_data(ctx: typer.Context) -> None:
    """Make the prompts of a benchmark.

    Example: shadowkv build-data ruler --tokenizer demo --context-length 4k --output datasets/demo
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


app.command("ruler")(ruler)
app.command("niah")(niah)
app.command("longbench")(longbench)
app.command("longbench-v2")(longbench_v2)
