"""What a run covers and how: the configurations of eval, bench and sweep, checked when made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shadowkv_cli.config import MethodSpec, ShadowKVSpec, split_list
from shadowkv_cli.errors import UsageError

AttentionBackend = Literal[
    "auto", "sdpa", "cudnn", "flash", "efficient", "math", "flash-attn", "flash-attn-4"
]
"""`sdpa` is what torch takes by itself; `cudnn` to `math` are its parts, the rest are packages."""

DEFAULT_BENCH_CONTEXT = 32_768
State = Literal["synthetic", "tokens", "prompts"]
EAGER = "eager-sdpa"
"""Method and cell of the second baseline: full attention in transformers' own forward."""

ANY_KERNEL = "any kernel"
"""How a row's phases were timed: how long any kernel of each ran. Earlier rows, which do not say,
have the sums of kernels' times."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and how it runs."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    backend: AttentionBackend = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    offline: bool = False

    @property
    def label(self) -> str:
        """The name for manifests: of a folder its last part, however its path was typed."""
        folder = Path(self.name).expanduser()
        return folder.resolve().name if folder.is_dir() else self.name


@dataclass(frozen=True)
class EvalConfig:
    """What an evaluation covers. None for tasks, lengths or samples: all that the data hold."""

    model: ModelChoice
    data: Path
    specs: tuple[MethodSpec, ...]
    output: Path
    tasks: tuple[str, ...] | None = None
    context_lengths: tuple[int, ...] | None = None
    num_samples: int | None = None
    allow_tokenizer_mismatch: bool = False
    fresh: bool = False
    command: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    num_workers: int = 1
    batch_size: int | None = 1  # samples decoded together; None: as many as fit with ease
    reuse_prefix: bool = False  # prompts take over the beginning that they share with another

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} must be at least 1, not {value}.")
        if self.num_samples is not None and self.num_samples < 1:
            raise UsageError(f"--num-samples must be at least 1, not {self.num_samples}.")
        if any(getattr(spec, "resident_layers", 0) == "auto" for spec in self.specs):
            raise UsageError(
                "resident_layers auto is for bench, which fills the memory: give a number."
            )
        if self.reuse_prefix and not any(spec.keeps_exact for spec in self.specs):
            names = ", ".join(dict.fromkeys(spec.name for spec in self.specs))
            raise UsageError(
                f"--reuse-prefix needs a method that keeps all keys and values of a prompt, which "
                f"none of {names} does: add full to --method."
            )


def parse_parts(values: Sequence[str] | None, what: str) -> tuple[int, ...]:
    """Read numbers of `lanes` or `micro-batches`. Raises UsageError for anything else."""
    for text in split_list(values or []):
        if not text.isdecimal():
            raise UsageError(f"--{what} '{text}' is no number of {what}: write one like 2.")
    return tuple(map(int, split_list(values or [])))


def parse_graphs(values: Sequence[str] | None) -> tuple[bool, ...]:
    """Read `on` and `off`. Raises UsageError for anything else."""
    words = {"on": True, "off": False}
    for text in split_list(values or []):
        if text not in words:
            raise UsageError(f"--graph must be on or off, not '{text}'.")
    return tuple(words[text] for text in split_list(values or []))


def parse_hit_rates(values: Sequence[str] | None) -> tuple[float | None, ...]:
    """Read `measured` (None) and shares like 0.88. Raises UsageError for anything else."""
    rates: list[float | None] = []
    for text in split_list(values or ["measured"]):
        try:
            rates.append(None if text == "measured" else float(text))
        except ValueError:
            raise UsageError(
                f"--hit-rate '{text}' is no share: write measured, or a number like 0.88."
            ) from None
    return tuple(rates)


@dataclass(frozen=True)
class BenchSettings:
    """How decoding is timed.

    Attributes:
        context_lengths: tokens of each prompt and of what is generated after it, together; for
            prompts of data, the length that these were fitted to. None given: see `for_model`.
        batch_rules: numbers of sequences, `equal` (full attention's largest that fits) or `auto`
            (the method's own largest).
        decode_steps: timed steps of a round, after `warmup_steps` untimed ones.
        rounds: measurements of each cell; all cells take turns within a round. The interval of a
            median needs 6 to cover 95 %.
        state: random keys and values; or a real prefill of random tokens, or of prompts.
        share: cells of one length and batch read one copy of the prompts' data.
        hit_rates: that cells which fetch are driven to, by queries that drift; None: as it comes.
        lanes: parts of a micro-batch whose fetches overlap, each tried; none: by the number of
            rows.
        micro_batches: parts of a batch that go through the layers one behind the other, each
            number tried; none: as many as are foretold to be faster, or 1 where `lanes` are given.
        graphs: whether a step is one CUDA graph, each tried; none: on a GPU it is.
        eager_baseline: time full attention in transformers' own forward, too.
        one_at_a_time: other micro-batches, lanes and graphs than the first only of a method's first
            cell, and one of the three at a time.
    """

    context_lengths: tuple[int, ...]
    batch_rules: tuple[str, ...] = ("1",)
    decode_steps: int = 64
    warmup_steps: int = 8
    rounds: int = 6
    state: State = "synthetic"
    share: bool = False
    backend: AttentionBackend = "auto"
    hit_rates: tuple[float | None, ...] = (None,)
    lanes: tuple[int, ...] = ()
    micro_batches: tuple[int, ...] = ()
    graphs: tuple[bool, ...] = ()
    eager_baseline: bool = False
    one_at_a_time: bool = False

    def __post_init__(self) -> None:
        for name, least in (("decode_steps", 1), ("rounds", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if value < least:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} must be at least {least}, not {value}.")
        for what, counts in (("lanes", self.lanes), ("micro-batches", self.micro_batches)):
            for count in counts:
                if count < 1:
                    raise UsageError(f"--{what} must be at least 1, not {count}.")
        for rate in self.hit_rates:
            if rate is not None and not 0 < rate < 1:
                raise UsageError(f"--hit-rate must lie between 0 and 1, not be {rate}.")
        for rule in self.batch_rules:
            if rule not in ("equal", "auto") and not (rule.isdigit() and int(rule)):
                raise UsageError(f"Batch size '{rule}' must be a number from 1, equal or auto.")

        for length in self.context_lengths:
            if length <= self.new_tokens:
                raise UsageError(
                    f"A context of {length} tokens holds no prompt beside {self.new_tokens} decode "
                    "steps: use a longer one, or fewer --decode-steps."
                )

    @property
    def new_tokens(self) -> int:
        return self.warmup_steps + self.decode_steps

    def for_model(self, max_positions: int) -> BenchSettings:
        """Choose a length where none was given: 32K, or all that the model has positions for.

        At 4K on a CPU the differences between cells drown in noise.
        """
        if self.context_lengths:
            return self
        return replace(self, context_lengths=(min(DEFAULT_BENCH_CONTEXT, max_positions),))

    def prompt_tokens(self, context_length: int) -> int:
        """Tokens of a prompt; for prompts of data, at most so many."""
        return context_length if self.state == "prompts" else context_length - self.new_tokens


@dataclass(frozen=True)
class BenchConfig:
    """What a benchmark covers."""

    model: ModelChoice
    specs: tuple[MethodSpec, ...]
    settings: BenchSettings
    output: Path
    data: Path | None = None
    fresh: bool = False
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.settings.state == "prompts" and self.data is None:
            raise UsageError("--state prompts needs the folder of the prompts: add --data DIR.")
        shadow = [spec for spec in self.specs if isinstance(spec, ShadowKVSpec)]
        if any(rate is not None for rate in self.settings.hit_rates) and not shadow:
            raise UsageError("--hit-rate drives what shadowkv selects: add it to --method.")
        on_host = [spec for spec in shadow if spec.value_placement == "host"]
        parts = (("lanes", self.settings.lanes), ("micro-batches", self.settings.micro_batches))
        for what, given in parts:
            if given and not on_host:
                raise UsageError(
                    f"--{what} overlap fetches from the host: add --value-placement host."
                )
        if self.settings.eager_baseline and self.settings.state == "prompts":
            raise UsageError(
                "--eager-baseline needs prompts of one length, which those of data are not: use "
                "--state tokens or synthetic."
            )


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep covers: an evaluation of all cells, and how their throughput is measured."""

    evaluation: EvalConfig
    throughput: BenchSettings | None


def default_output(kind: str, model: str, identity: Mapping[str, Any]) -> Path:
    """A readable folder name that another configuration does not share."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    short = model.rstrip("/").split("/")[-1].lower()
    return Path("results") / f"{kind}-{short}-{digest[:8]}"
