"""shadowkv build-data longbench --tokenizer smollm2 --source data.zip --output d/lb"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shadowkv_cli.commands.forecast import show_forecast
from shadowkv_cli.config import parse_token_count
from shadowkv_cli.console import notice, print_json, print_table
from shadowkv_cli.errors import UsageError
from shadowkv_cli.option_groups import check_revision, given_names, spread
from shadowkv_cli.options import (
    ConfigOption,
    DatasetOption,
    DryRunOption,
    JsonOption,
    OfflineOption,
    TasksOption,
    TemplateOption,
    TokenizerOption,
    TokenizerRevisionOption,
    TrustOption,
)

if TYPE_CHECKING:
    from shadowkv_cli.tasks.longbench.build import LongBenchBuild
    from shadowkv_cli.tasks.longbench.suites import Suite

V1_MAX_LENGTH = "31500"
"""LongBench's own for models of 32K."""
V2_MAX_LENGTH = "120000"


@dataclass(frozen=True)
class BuildOptions:
    """What both benchmarks ask."""

    tokenizer: TokenizerOption
    output: DatasetOption
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="The published file or archive, or a folder with its files. [default: the hub]",
        ),
    ] = None
    num_samples: Annotated[
        int | None, typer.Option(metavar="N", help="The first so many of each set; all by default.")
    ] = None
    min_length: Annotated[
        str | None,
        typer.Option(metavar="LENGTH", help="Leave out prompts of fewer tokens, such as 4k."),
    ] = None
    template: TemplateOption = "auto"
    revision: TokenizerRevisionOption = None
    trust_remote_code: TrustOption = False
    offline: OfflineOption = False
    dry_run: DryRunOption = False
    json: JsonOption = False
    config: ConfigOption = None


@spread
def longbench(
    options: BuildOptions,
    tasks: TasksOption = None,
    language: Annotated[
        Literal["en", "zh", "all"],
        typer.Option(help="en or zh: the sets of that language and the two of code."),
    ] = "all",
    e: Annotated[
        bool, typer.Option("--e", help="LongBench-E: 13 sets, also averaged by their length.")
    ] = False,
    max_length: Annotated[
        str,
        typer.Option(metavar="LENGTH", help="Longer prompts lose their middle, as officially."),
    ] = V1_MAX_LENGTH,
    compat: Annotated[
        Literal["true", "official"],
        typer.Option(
            help="ROUGE-L of long sentences: its true value, or the 0 that LongBench gives."
        ),
    ] = "true",
) -> None:
    """Build LongBench's prompts; continues where it was stopped.

    Example: shadowkv build-data longbench --tokenizer smollm2 --source data.zip --output d/lb
    """
    from shadowkv_cli.tasks.longbench.definitions import choose_sets
    from shadowkv_cli.tasks.longbench.suites import V1Suite

    names = None if tasks is None else given_names(tasks, "--tasks")
    chosen = choose_sets(names, language, e=e)
    _build(options, V1Suite(tuple(chosen), e, compat), max_length)


@spread
def longbench_v2(
    options: BuildOptions,
    prompt: Annotated[
        Literal["0shot", "cot", "no-context"],
        typer.Option(
            help="With the document; cot: in two calls, the second of which reads each method's "
            "own first answer; or without the document, which shows what is known anyway."
        ),
    ] = "0shot",
    max_length: Annotated[
        str,
        typer.Option(metavar="LENGTH", help="Longer prompts lose their middle, as officially."),
    ] = V2_MAX_LENGTH,
) -> None:
    """Build the 503 multiple-choice prompts of LongBench v2; continues where it was stopped.

    Example: shadowkv build-data longbench-v2 --tokenizer smollm2 --source data.json --output d/v2
    """
    from shadowkv_cli.tasks.longbench.suites import V2Suite

    _build(options, V2Suite(prompt), max_length)


def _tokens(text: str, option: str) -> int:
    try:
        return parse_token_count(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def _build(options: BuildOptions, suite: Suite, max_length: str) -> None:
    from shadowkv_cli.tasks.longbench.build import LongBenchBuild, LongBenchConfig

    check_revision(options.tokenizer, options.revision)
    least = options.min_length
    build = LongBenchBuild(
        LongBenchConfig(
            tokenizer=options.tokenizer,
            output=options.output,
            suite=suite,
            max_length=_tokens(max_length, "--max-length"),
            source=options.source,
            num_samples=options.num_samples,
            min_length=None if least is None else _tokens(least, "--min-length"),
            template=options.template,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            offline=options.offline,
        )
    )
    if options.dry_run:
        show_forecast(build.forecast(), build.num_workers, options.json)
        return
    build.run()
    _show_result(options, build)


def _show_result(options: BuildOptions, build: LongBenchBuild) -> None:
    manifest, length = build.manifest, str(build.context_length)
    if options.json:
        names = ("suite", "rows", "fill", "lost_middle", "template", "sources", "note")
        print_json({"output": str(options.output), **{name: manifest[name] for name in names}})
        if manifest["note"]:
            notice(manifest["note"])
        return
    fill, lost = manifest["fill"][length], manifest["lost_middle"][length]
    rows = [
        [task, str(count), f"{fill[task] * build.context_length:,.0f}", str(lost[task])]
        for task, count in manifest["rows"][length].items()
        if task in fill
    ]
    notes = [
        f"Mean tokens of prompt and answer; lost middle: prompts that were longer than "
        f"{manifest['max_length']} tokens. Template: {manifest['template']['resolved']}.",
        *([manifest["note"]] if manifest["note"] else []),
        f"Written to {options.output}",
    ]
    print_table(manifest["suite"], ["dataset", "samples", "tokens", "lost middle"], rows, notes)
