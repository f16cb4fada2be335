"""shadowkv spectrum --model smollm2 --data datasets/smollm2 --num-samples 2"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shadowkv_cli.console import notice, print_json
from shadowkv_cli.errors import UsageError
from shadowkv_cli.option_groups import DataOptions, ModelOptions, given_lengths, given_names, spread
from shadowkv_cli.options import ConfigOption, JsonOption
from shadowkv_cli.run_config import EvalConfig


@spread
def spectrum(
    *,
    model: ModelOptions,
    data: DataOptions,
    rank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[,…]",
            help="Ranks to report; commas or repeats. [default: shares of the keys' width]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write spectrum.json into this folder.")
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say how much of a model's pre-RoPE keys each rank keeps, and what can be packed.

    One prefill a sample, no decoding: a first look at which ranks are worth a sweep.

    Example: shadowkv spectrum --model demo --data datasets/demo --num-samples 2
    """
    from shadowkv_cli.results import check_writable
    from shadowkv_cli.spectrum import measure_spectrum

    if output is not None:
        check_writable(output)
    lengths = given_lengths(data.context_length, "--context-length")
    choice = EvalConfig(
        model=model.choice(),
        data=data.data,
        specs=(),
        output=output or Path(),
        tasks=tuple(given_names(data.tasks, "--tasks")) if data.tasks is not None else None,
        context_lengths=lengths or None,
        num_samples=data.num_samples,
        allow_tokenizer_mismatch=data.allow_tokenizer_mismatch,
        command=("shadowkv", *sys.argv[1:]),
    )
    ranks = [_whole(text) for text in given_names(rank, "--rank")] if rank is not None else []
    found = measure_spectrum(choice, ranks)
    if json:
        print_json(found.content())
    else:
        found.table().show()
    if output is not None:
        notice(f"Written to {found.write(output)}")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"--rank must be whole numbers, not '{text}'.")
    return int(text)
