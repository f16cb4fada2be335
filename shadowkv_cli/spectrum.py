"""How much of a model's pre-RoPE keys each rank keeps, and what can be packed, on real prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv_cli.config import PACKABLE, ShadowKVSpec, SparseBudget
from shadowkv_cli.console import progress
from shadowkv_cli.errors import UsageError
from shadowkv_cli.evaluate import environment_of, load_inputs
from shadowkv_cli.rowlog import write_atomic, write_failure
from shadowkv_cli.run_config import EvalConfig
from shadowkv_cli.tables import Table
from shadowkv_cli.tasks.tokenization import encode_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from shadowkv_cli.methods import PromptStore

DEFAULT_SHARES = (1 / 32, 1 / 16, 1 / 8, 5 / 32, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Of the width of a layer's keys; 5/32 is the paper's 160 of 1,024."""
FILE = "spectrum.json"


@dataclass(frozen=True)
class RankEnergy:
    """What a rank keeps, in shares of 1; means over the prompts.

    Attributes:
        rank: columns kept, of `width`.
        kept: share of the squared norm of a layer's pre-RoPE keys, mean over the layers.
        kept_lowest, lowest_layer: of the layer that loses most, and which it is.
        around_mean, around_mean_lowest: the same after the prompt's mean key is taken off, which
            alone holds much of the norm and tells no token from another.
    """

    rank: int
    width: int
    kept: float
    kept_lowest: float
    lowest_layer: int
    around_mean: float
    around_mean_lowest: float


@dataclass(frozen=True)
class Strays:
    """How many elements of a row lie far below its largest one, in bfloat16.

    Attributes:
        rows: tokens of a layer and KV head each, or landmarks, by their number of strays from 0 on.
        most_that_fit: of a row that can be packed.
    """

    rows: list[int]
    most_that_fit: int

    def note(self, what: str) -> str:
        total, most = sum(self.rows), len(self.rows) - 1
        fits = f"{self.most_that_fit} fit" if most <= self.most_that_fit else "they do not fit"
        return (
            f"Packed {what}: {total - self.rows[0]:,} of {total:,} of a KV head have elements that "
            f"must be listed, {most} at most: {fits}."
        )


@dataclass(frozen=True)
class Spectrum:
    """The energies, the strays, and what they were measured on."""

    energies: list[RankEnergy]
    strays: Mapping[str, Strays]
    """Of `values` and of `landmarks`."""
    prompts: int
    facts: Mapping[str, Any]

    def content(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        energies = [asdict(energy) for energy in self.energies]
        return {
            **self.facts,
            "energies": energies,
            "strays": {name: asdict(own) for name, own in self.strays.items()},
        }

    def table(self) -> Table:
        rows = [
            [
                str(e.rank),
                f"{e.rank / e.width:.1%}",
                *(f"{x:.2%}" for x in (e.kept, e.kept_lowest)),
                str(e.lowest_layer),
                *(f"{x:.2%}" for x in (e.around_mean, e.around_mean_lowest)),
            ]
            for e in self.energies
        ]
        return Table(
            f"Energy of the pre-RoPE keys that each rank keeps, {self.prompts} prompts",
            [
                *("rank", "of the width", "kept", "lowest layer", "which"),
                *("kept around the mean", "lowest layer, around the mean"),
            ],
            rows,
            [
                "Best rank per layer and prompt, all KV heads side by side: ShadowKV's way.",
                *(own.note(name) for name, own in self.strays.items()),
            ],
        )

    def write(self, folder: Path) -> Path:
        """Write everything as JSON; returns the file. Raises ShadowKVError if that fails."""
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failure(folder, error) from error
        write_atomic(path, json.dumps(self.content(), indent=2) + "\n")
        return path


def ranks_of(asked: Sequence[int], width: int) -> list[int]:
    """The ranks to report, ascending. Raises UsageError for one beyond the keys' width."""
    for rank in asked:
        if not 0 < rank <= width:
            raise UsageError(f"--rank must be 1 to {width} for this model, not {rank}.")
    return sorted(set(asked or [max(1, round(share * width)) for share in DEFAULT_SHARES]))


def _shares(coefficients: Tensor, ranks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Energy kept by each rank of one layer, plain and around the mean.

    Args:
        coefficients: [S, W], keys in the basis of their singular vectors, the largest first.
    """
    import torch

    exact = coefficients.double()
    plain = exact.square().sum(0).cumsum(0)
    # The mean is taken off first: another matrix, with singular vectors of its own.
    centred = exact - exact.mean(0)
    around = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp_min(0).cumsum(0)
    return tuple(  # type: ignore[return-value]
        [float(sums[rank - 1] / sums[-1]) for rank in ranks] for sums in (plain, around)
    )


def measure_spectrum(config: EvalConfig, asked: Sequence[int]) -> Spectrum:
    """Prefill every sample of the configuration and factorise its keys at full rank.

    Raises:
        UsageError: an impossible rank, or data and model that do not fit together.
        ShadowKVError: the model cannot be loaded.
    """
    import torch

    from shadowkv_cli.model.session import Session
    from shadowkv_cli.ops.packed import MOST_STRAYS, stray_counts

    ready = load_inputs(config)
    loaded, samples = ready.loaded, ready.work.samples
    width = loaded.shape.key_width
    ranks = ranks_of(asked, width)
    spec = ShadowKVSpec(rank=width, sparse_budget=SparseBudget.parse("8"), dense_fallback="never")
    loaded.check([spec], ready.work.longest)
    longest = max(sample.prompt_tokens for sample in samples)
    session = Session(loaded, [spec], prompt_tokens=longest, new_tokens=1)
    layers = range(loaded.shape.num_layers)
    found: list[list[tuple[list[float], list[float]]]] = [[] for _ in layers]
    counts = {name: torch.zeros(loaded.shape.head_dim + 1, dtype=torch.long) for name in PACKABLE}
    with progress(f"spectrum {config.model.name}", len(samples)) as bar:
        for sample in samples:
            ids = encode_prompt(ready.tokenizer, sample.text)
            session.prefill(ids, key=sample.id)
            for layer in layers:
                coefficients = session.store.coefficients[layer][0, : len(ids)]
                found[layer].append(_shares(coefficients, ranks))
                for name, rows in _packable(session.store, layer, len(ids)).items():
                    own = stray_counts(rows.bfloat16()).flatten()
                    counts[name] += own.bincount(minlength=len(counts[name])).cpu()
            bar.advance(detail=f"{sample.task} {sample.context_length}")
    facts = {
        "command": list(config.command),
        "model": config.model.label,
        "model_fingerprint": loaded.fingerprint,
        "data_fingerprint": ready.dataset.fingerprint(),
        "samples": [sample.id for sample in samples],
        "environment": environment_of(loaded),
    }
    energies = [_average(found, i, rank, width) for i, rank in enumerate(ranks)]
    strays = {
        name: Strays(own[: int(own.nonzero().max()) + 1].tolist(), MOST_STRAYS)
        for name, own in counts.items()
    }
    return Spectrum(energies, strays, len(samples), facts)


def _packable(store: PromptStore, layer: int, tokens: int) -> dict[str, Tensor]:
    """Rows of a layer of the first prompt that may be packed, [..., D]."""
    [(form, landmarks)] = store.landmarks.items()
    return {
        "values": store.values[layer][0, :, :tokens],
        "landmarks": landmarks[layer][0, :, : tokens // form[0]],
    }


def _average(
    found: list[list[tuple[list[float], list[float]]]], index: int, rank: int, width: int
) -> RankEnergy:
    """Means over the prompts of one rank, per layer, then over the layers."""
    plain, around = (
        [sum(shares[kind][index] for shares in layer) / len(layer) for layer in found]
        for kind in (0, 1)
    )
    return RankEnergy(
        rank=rank,
        width=width,
        kept=sum(plain) / len(plain),
        kept_lowest=min(plain),
        lowest_layer=plain.index(min(plain)),
        around_mean=sum(around) / len(around),
        around_mean_lowest=min(around),
    )
