"""Groups of options that several commands share: a dataclass each, spread over the command line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from shadowkv_cli.batching import parse_batch_size
from shadowkv_cli.catalogue.places import without_hub
from shadowkv_cli.cells import build_specs, grid, one_at_a_time
from shadowkv_cli.config import MethodSpec, parse_lengths, split_list
from shadowkv_cli.errors import UsageError
from shadowkv_cli.options import (
    ConfigOption,
    DataOption,
    DryRunOption,
    JsonOption,
    OfflineOption,
    TasksOption,
    TrustOption,
)
from shadowkv_cli.run_config import (
    AttentionBackend,
    BenchSettings,
    EvalConfig,
    ModelChoice,
    State,
    default_output,
)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups: each parameter that is one becomes the options of its fields.

    A list option that was given and holds nothing is refused before the command runs.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, list):
                given_names(value, "--" + name.replace("_", "-"))
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += _options_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    del run.__wrapped__
    return run


def _options_of(group: type) -> Iterable[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        missing = field.default is dataclasses.MISSING
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if missing else field.default,
            annotation=hints[field.name],
        )


def given_names(values: Iterable[str], option: str) -> list[str]:
    """The parts of a list option that was given. Raises UsageError where it holds none."""
    names = split_list(values)
    if not names:
        raise UsageError(f"{option} is empty: give it a value, or leave it out.")
    return names


def given_lengths(values: Sequence[str] | None, option: str) -> tuple[int, ...]:
    """Lengths in tokens, each once; () where the option was left out."""
    return () if values is None else parse_lengths(given_names(values, option), option)


def check_revision(name: str, revision: str | None) -> None:
    """Raise UsageError for a revision of what is not on the hub, which has none."""
    local = without_hub(name) is not None or Path(name).expanduser().is_dir()
    if revision is not None and local:
        raise UsageError(f"--revision has no effect: {name} is not on the hub.")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs."""

    model: Annotated[
        str,
        typer.Option(
            metavar="HUB_ID|PATH|demo|smollm2|shape:NAME",
            help="A Hugging Face model, its folder, `demo`, which comes along, or `smollm2`, real "
            "weights that need no hub; or `shape:NAME`, a true size with random weights, for times "
            "and memory only.",
        ),
    ]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Precision; auto: bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one."
        ),
    ] = "auto"
    attention_backend: Annotated[
        AttentionBackend,
        typer.Option(
            help="Exact attention of the prefill. auto: the fastest of what is installed, timed "
            "once on the prompt's shape; sdpa: torch's own choice; cudnn, flash, efficient and "
            "math: that part of torch; the others are packages (extras of the same names)."
        ),
    ] = "auto"
    revision: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Branch, tag or commit of the model on the hub."),
    ] = None
    trust_remote_code: TrustOption = False
    offline: OfflineOption = False

    def choice(self) -> ModelChoice:
        """Raises UsageError for a revision of what is not on the hub."""
        check_revision(self.model, self.revision)
        return ModelChoice(
            self.model,
            self.dtype,
            self.device,
            self.attention_backend,
            self.revision,
            self.trust_remote_code,
            self.offline,
        )


def _many(metavar: str, help: str) -> Any:
    return typer.Option(
        metavar=metavar + "[,…]", help=help + "; commas or repeats for several cells."
    )


@dataclass(frozen=True)
class MethodOptions:
    """Which methods, and settings that apply to each of them that has such a setting."""

    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:key=value,…]",
            help="full, shadowkv, oracle, random or streaming; commas or repeats. "
            "[default: full,shadowkv]",
        ),
    ] = None
    sparse_budget: Annotated[
        list[str] | None,
        _many("TOKENS|SHARE%", "Prompt tokens selected per step: a number, or a share like 1.5%"),
    ] = None
    rank: Annotated[list[str] | None, _many("N", "Rank of the low-rank keys")] = None
    chunk_size: Annotated[list[str] | None, _many("N", "Tokens per chunk")] = None
    landmarks_per_chunk: Annotated[
        list[str] | None, _many("1|2|4", "Means that describe a chunk; 1 is the paper's")
    ] = None
    outlier_chunks: Annotated[
        list[str] | None,
        _many("N|auto", "Chunks kept exactly because a mean describes them badly"),
    ] = None
    local_chunks: Annotated[
        list[str] | None, _many("N", "Chunks at the prompt's end that are always kept")
    ] = None
    dense_fallback: Annotated[
        list[str] | None,
        _many(
            "auto|never",
            "auto: prompts not longer than what is kept get full attention; never: the method",
        ),
    ] = None
    value_placement: Annotated[
        list[str] | None,
        _many("device|host", "Where values lie: with the model, or in pinned host memory"),
    ] = None
    value_buffer: Annotated[
        list[str] | None,
        _many("FACTOR", "Values held beside the model, as a multiple of the chunks selected"),
    ] = None
    key_buffer: Annotated[list[str] | None, _many("FACTOR", "The same for rebuilt keys")] = None
    value_dtype: Annotated[
        list[str] | None,
        _many(
            "model|packed|fp8",
            "Values until they are attended: as the model has them, in fewer bytes without a loss "
            "(of bfloat16), or in 8 bits",
        ),
    ] = None
    landmark_dtype: Annotated[
        list[str] | None,
        _many("model|packed|fp8", "The same for landmarks, which select chunks"),
    ] = None
    resident_layers: Annotated[
        list[str] | None,
        _many(
            "N|auto",
            "Layers, spread evenly, whose values stay with the model though --value-placement is "
            "host; auto, for bench: as many as fit",
        ),
    ] = None

    def specs(self, *, star: bool = False) -> list[MethodSpec]:
        """Every combination of the settings given, applied to every method.

        With `star`, settings vary one at a time around the first value of each.

        Raises UsageError for an unknown method or setting, or an impossible cell.
        """
        axes: dict[str, list[str]] = {}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None:
                axes[field.name] = given_names(value, "--" + field.name.replace("_", "-"))
        methods = ["full", "shadowkv"] if self.method is None else self.method
        if not axes:
            return build_specs(methods, {})
        return one_at_a_time(methods, axes) if star else grid(methods, axes)


@dataclass(frozen=True)
class RunOptions:
    """Where results go, and how the command behaves."""

    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the run; a name is made if left out."),
    ] = None
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over: say what is in the folder and delete it."),
    ] = False
    dry_run: DryRunOption = False
    json: JsonOption = False
    config: ConfigOption = None

    @property
    def command(self) -> tuple[str, ...]:
        """The command line, for the manifest."""
        return ("shadowkv", *sys.argv[1:])


@dataclass(frozen=True)
class DataOptions:
    """Which samples of which data."""

    data: DataOption
    num_samples: Annotated[
        int | None, typer.Option(metavar="N", help="The first so many samples of each task.")
    ] = None
    tasks: TasksOption = None
    context_length: Annotated[
        list[str] | None,
        typer.Option(metavar="LENGTH[,…]", help="Only these lengths; commas or repeats."),
    ] = None
    allow_tokenizer_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-tokenizer-mismatch",
            help="Run on data that another tokenizer fitted; recorded in every row.",
        ),
    ] = False


@dataclass(frozen=True)
class AnswerOptions(DataOptions):
    """The same, how long answers may be, and how many are given at a time."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Cut answers at so many tokens, fewer than the data allow; noted."
        ),
    ] = None
    num_workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Processes that answer samples side by side, each with a model of its own; "
            "several GPUs are shared out.",
        ),
    ] = 1
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Samples that are decoded together, each prefilled by itself: sooner done, but "
            "rounded differently, as products of another size are. auto: up to 8, as many as a "
            "quarter of the free memory holds.",
        ),
    ] = "1"
    reuse_prefix: Annotated[
        bool,
        typer.Option(
            "--reuse-prefix/--no-reuse-prefix",
            help="Let a prompt take over the keys and values of the beginning that it shares with "
            "one just before it: sooner done, but rounded differently, as products of another size "
            "are. Needs full, oracle or random among the methods.",
        ),
    ] = False


OneAtATimeOption = Annotated[
    bool,
    typer.Option(
        "--one-at-a-time",
        help="Vary one setting at a time, the others at the first value of their lists, "
        "instead of every combination.",
    ),
]
BatchSizeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="N|equal|auto[,…]",
        help="Sequences decoded together: numbers, equal (full attention's largest) or auto (the "
        "method's own largest); commas or repeats. [default: 1]",
    ),
]


@dataclass(frozen=True)
class TimingOptions:
    """How decoding is timed."""

    decode_steps: Annotated[
        int, typer.Option(metavar="N", help="Timed decode steps of each round.")
    ] = 64
    warmup_steps: Annotated[int, typer.Option(metavar="N", help="Untimed steps before them.")] = 8
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Measurements of each cell; the cells take turns.")
    ] = 6

    def settings(
        self,
        context_lengths: Sequence[int],
        batch_size: Sequence[str] | None,
        state: State,
        backend: AttentionBackend,
        *,
        share: bool,
    ) -> BenchSettings:
        return BenchSettings(
            tuple(context_lengths),
            tuple(split_list(batch_size or ["1"])),
            self.decode_steps,
            self.warmup_steps,
            self.rounds,
            state,
            share,
            backend,
        )


def eval_config(
    kind: str,
    model: ModelOptions,
    data: AnswerOptions,
    specs: Sequence[MethodSpec],
    run: RunOptions,
) -> EvalConfig:
    """Put the groups of `eval` and `sweep` together."""
    choice = model.choice()
    lengths = given_lengths(data.context_length, "--context-length")
    identity = {"model": choice, "data": data.data, "cells": [spec.cell for spec in specs]}
    return EvalConfig(
        model=choice,
        data=data.data,
        specs=tuple(specs),
        output=run.output or default_output(kind, model.model, identity),
        tasks=tuple(given_names(data.tasks, "--tasks")) if data.tasks is not None else None,
        context_lengths=lengths or None,
        num_samples=data.num_samples,
        allow_tokenizer_mismatch=data.allow_tokenizer_mismatch,
        fresh=run.fresh,
        command=run.command,
        max_new_tokens=data.max_new_tokens,
        num_workers=data.num_workers,
        batch_size=parse_batch_size(data.batch_size),
        reuse_prefix=data.reuse_prefix,
    )
