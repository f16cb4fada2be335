"""shadowkv build-data ruler|niah --tokenizer demo --context-length 4k --output datasets/demo"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shadowkv_cli.commands.forecast import show_forecast
from shadowkv_cli.console import notice, print_json, print_table
from shadowkv_cli.option_groups import check_revision, given_lengths, given_names, spread
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
    from shadowkv_cli.tasks.ruler.build import RulerConfig


@dataclass(frozen=True)
class RulerOptions:
    """What RULER and the grid of needles both ask."""

    tokenizer: TokenizerOption
    context_length: Annotated[
        list[str],
        typer.Option(
            "--context-length",
            metavar="LENGTH[,…]",
            help="Tokens of prompt and answer, like 4k or 131072; commas or repeats.",
        ),
    ]
    output: DatasetOption
    template: TemplateOption = "auto"
    sources: Annotated[
        Literal["hub", "synthetic"] | None,
        typer.Option(
            help="Essays and questions: from the hub, or written by this program without a "
            "network. Default: hub; synthetic for demo and smollm2."
        ),
    ] = None
    essays: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Essays as text or as RULER's PaulGrahamEssays.json."),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Determines every row.")] = 42
    num_workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes; by default several where it pays."),
    ] = None
    revision: TokenizerRevisionOption = None
    trust_remote_code: TrustOption = False
    offline: OfflineOption = False
    dry_run: DryRunOption = False
    json: JsonOption = False
    config: ConfigOption = None

    def build_config(self, **more: Any) -> RulerConfig:
        """The configuration with what one command asks beyond this. Raises UsageError."""
        from shadowkv_cli.tasks.ruler.build import RulerConfig

        check_revision(self.tokenizer, self.revision)
        return RulerConfig(
            tokenizer=self.tokenizer,
            context_lengths=given_lengths(self.context_length, "--context-length"),
            output=self.output,
            template=self.template,
            sources=self.sources,
            essays=self.essays,
            seed=self.seed,
            num_workers=self.num_workers,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            offline=self.offline,
            **more,
        )


@spread
def ruler(
    options: RulerOptions,
    num_samples: Annotated[
        int, typer.Option(metavar="N", help="Samples per task and length.")
    ] = 96,
    tasks: TasksOption = None,
    squad: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SQuAD's dev-v2.0.json.")
    ] = None,
    hotpotqa: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="HotpotQA's hotpot_dev_distractor_v1.json."),
    ] = None,
    english_words: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="RULER's json/english_words.json: cwe of --fit official from 128k."
        ),
    ] = None,
    fit: Annotated[
        Literal["best", "official"],
        typer.Option(
            help="best fills every prompt; official gives NVIDIA main's own rows, byte for byte, "
            "where the sources are the same."
        ),
    ] = "best",
    dialect: Annotated[
        Literal["nvidia", "shadowkv"],
        typer.Option(
            help="shadowkv: the 11 tasks, wording and metrics of ShadowKV's authors, flaws "
            "included, to lay beside the paper's Table 1; not comparable with RULER."
        ),
    ] = "nvidia",
    shuffle_gold: Annotated[
        bool,
        typer.Option(
            "--shuffle-gold",
            help="qa: spread the documents with the answers evenly over the prompts; RULER has "
            "them at one place.",
        ),
    ] = False,
) -> None:
    """Build RULER prompts that fill their context length; continues where it was stopped.

    Example: shadowkv build-data ruler --tokenizer demo --context-length 4k --output datasets/demo
    """
    _build(
        options,
        "RULER",
        num_samples=num_samples,
        tasks=None if tasks is None else tuple(given_names(tasks, "--tasks")),
        squad=squad,
        hotpotqa=hotpotqa,
        english_words=english_words,
        fit=fit,
        dialect=dialect,
        shuffle_gold=shuffle_gold,
    )


@spread
def niah(
    options: RulerOptions,
    num_samples: Annotated[
        int,
        typer.Option(metavar="N", help="Samples per depth and length; the heat map needs 10."),
    ] = 10,
    depths: Annotated[
        int, typer.Option(metavar="N", help="Depths of the needle, evenly from 0 to 100 percent.")
    ] = 10,
) -> None:
    """Build a grid of context lengths by depths with one needle each, for the heat map of `plot`.

    Example: shadowkv build-data niah --tokenizer demo --context-length 2k,4k,8k --output d/niah
    """
    _build(options, "Needles by depth", num_samples=num_samples, depths=depths, dialect="grid")


def _build(options: RulerOptions, title: str, **more: Any) -> None:
    from shadowkv_cli.tasks.ruler.build import RulerBuild

    build = RulerBuild(options.build_config(**more))
    if options.dry_run:
        show_forecast(build.forecast(), build.num_workers, options.json)
        return
    build.run()
    _show_result(title, options.output, build.manifest, options.json)


def _show_result(title: str, output: Path, manifest: dict[str, Any], json: bool) -> None:
    names = ("dialect", "rows", "fill", "template", "sources", "synthetic", "note")
    if json:
        print_json({"output": str(output), **{name: manifest[name] for name in names}})
        if manifest["note"]:
            notice(manifest["note"])
        return
    lengths = [str(length) for length in manifest["context_lengths"]]
    rows = []
    for task in manifest["tasks"]:
        cells = [task]
        for length in lengths:
            fill = manifest["fill"].get(length, {}).get(task)
            count = manifest["rows"][length].get(task, 0)
            cells.append("" if fill is None else f"{100 * fill:.2f}% of {count}")
        rows.append(cells)
    notes = [
        f"Mean fill: tokens of prompt and answer over the context length. Template: "
        f"{manifest['template']['resolved']}.",
        *([manifest["note"]] if manifest["note"] else []),
        *(f"Known flaw: {flaw}." for flaw in manifest.get("known_flaws", [])),
        f"Written to {output}",
    ]
    print_table(title, ["task", *lengths], rows, notes)
