"""How long a step of several cells on a few prompts takes as one CUDA graph: phase by phase.

What one cell alone takes (see `plan`), with the weights read once, and what a launch costs counted
once a group of cells that work as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shadowkv_cli.bench import plan
from shadowkv_cli.config import FullSpec, MethodSpec, ModelShape
from shadowkv_cli.layout import layout

if TYPE_CHECKING:
    from shadowkv_cli.bench.probes import Probe

BESIDE = ("fetch", "rebuild")
"""Phases of a group that run beside each other."""


def step_ms(
    specs: Sequence[MethodSpec],
    shape: ModelShape,
    weight_bytes: int,
    probe: Probe,
    prompt_tokens: int,
    *,
    hit_rate: float,
    samples: int = 1,
) -> float:
    """Milliseconds of a step of one row a cell and sample; cells that are dense here share one."""
    active = [spec for spec in specs if not spec.is_dense(prompt_tokens)]
    rows: list[MethodSpec] = [*active]
    if len(active) < len(specs):
        rows.append(FullSpec())
    groups: dict[object, list[MethodSpec]] = {}
    for spec in rows:
        groups.setdefault(layout(spec), []).append(spec)

    def phases_of(spec: MethodSpec, batch: int) -> dict[str, float]:
        return plan.phase_ms(
            spec, shape, weight_bytes, probe, prompt_tokens, batch, hit_rate=hit_rate, lanes=1
        )

    total = phases_of(FullSpec(), len(rows) * samples)["dense"]
    for own in groups.values():
        sums: dict[str, float] = {}
        for spec in own:
            for name, ms in phases_of(spec, samples).items():
                sums[name] = sums.get(name, 0.0) + ms
        for name in sums:
            launch = shape.num_layers * plan.LAUNCH_US.get(name, 0.0) / 1e3
            sums[name] -= (len(own) - 1) * launch
        alone = sum(ms for name, ms in sums.items() if name not in ("dense", "step", *BESIDE))
        total += alone + max((sums.get(name, 0.0) for name in BESIDE), default=0.0)
    return total
