"""Where the bytes of a decoding batch lie and how long each phase of a captured step will take.

Arithmetic from sizes, probes and a hit rate. A phase takes a fixed time for each launch and the
time of its bytes at a share of the probe; the constants were fitted to runs on one H100
(results/h100-decode, and those at batch 1, in fp8 and at 245,760 tokens), and what overlaps is
taken off. On a CPU nothing is foretold this way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowkv_cli.config import MethodSpec, ModelShape, ShadowKVSpec, SparseSpec, row_bytes

if TYPE_CHECKING:
    from shadowkv_cli.bench.probes import Probe

LAUNCH_US: Mapping[str, float] = {
    "dense": 15,
    "select": 20,
    "residency": 10,
    "fetch": 3,
    "rebuild": 9,
    "attention": 8,
}
"""Microseconds of each launch of a phase that its bytes do not explain."""

SHARE: Mapping[str, float] = {
    "dense": 0.94,
    "select": 0.95,
    "select in fp8": 0.76,  # half the bytes take as many products, and as much ranking
    "select of several in fp8": 0.5,  # landmarks a chunk
    "fetch": 0.95,
    "rebuild": 0.25,
    "attention": 0.85,
    "full attention": 0.945,
}
"""Of the probe (for fetch: of the gather from pinned memory), what the bytes of a phase reach."""

DENSE_ROW_US = 0.9
"""Microseconds that each row adds to the dense part of a layer."""


@dataclass(frozen=True)
class Item:
    """Bytes of one thing that a batch holds, on the device and in pinned host memory."""

    name: str
    device: int
    host: int = 0


def memory_items(
    spec: MethodSpec, shape: ModelShape, prompt_tokens: int, new_tokens: int, batch: int
) -> list[Item]:
    """What a method holds for a batch, beside the model's weights; in sum `cache_bytes`."""
    unit = shape.num_layers * shape.element_bytes * batch
    width = shape.key_width
    if not isinstance(spec, ShadowKVSpec) or spec.is_dense(prompt_tokens):
        held = spec.cache_bytes(shape, prompt_tokens, new_tokens)
        return [Item("keys and values", held.device * batch, held.host * batch)]
    kept = spec.keeps(prompt_tokens)
    landmarks = batch * shape.num_layers * spec.landmark_bytes(shape, prompt_tokens)
    fixed = kept.outlier_tokens + kept.local_tokens + new_tokens
    keys, values = (
        shape.num_layers * batch * held for held in spec.buffer_bytes(shape, prompt_tokens)
    )
    forms = spec.value_forms(shape.num_layers)
    beside, on_host = (
        batch * sum(f.data_bytes(shape, prompt_tokens) for f in forms if f.placement == placement)
        for placement in ("device", "host")
    )
    scales = batch * sum(form.scale_bytes(shape, prompt_tokens) for form in forms)
    return [
        Item("landmarks", landmarks),
        Item("low-rank keys", unit * spec.rank * (prompt_tokens + width)),
        Item("key buffer", keys),
        Item("value buffer", values),
        Item("outliers, local and generated tokens", unit * width * 2 * fixed),
        Item("values", beside, on_host),
        Item("scales of values", scales),
        Item("tables", shape.num_layers * batch * spec.table_bytes(shape, prompt_tokens)),
    ]


def phase_bytes(
    spec: MethodSpec,
    shape: ModelShape,
    weight_bytes: int,
    prompt_tokens: int,
    batch: int,
    *,
    hit_rate: float,
    micro_batches: int = 1,
) -> dict[str, float]:
    """Bytes that each phase of a step must move, all layers, indices left out.

    Each micro-batch reads the weights. `fetch` crosses the bus: values of layers that stay on the
    device are no part of it. All others are in the device's memory. Of residency nothing is told:
    its tables are small.
    """
    token = shape.head_dim * shape.element_bytes
    planes = shape.num_layers * batch * shape.num_kv_heads
    found: dict[str, float] = {"dense": micro_batches * weight_bytes}
    if not isinstance(spec, SparseSpec) or spec.is_dense(prompt_tokens):
        return found | {"attention": 2 * planes * prompt_tokens * token}
    kept = spec.keeps(prompt_tokens)
    found["attention"] = 2 * planes * kept.tokens * token
    if isinstance(spec, ShadowKVSpec):
        # Those of chunks; the fixed part has the model's.
        saved = token - row_bytes(spec.value_dtype, shape)
        found["attention"] -= planes * kept.selected_tokens * saved
        missing = planes * kept.selected_tokens * (1 - hit_rate)
        found["select"] = batch * shape.num_layers * spec.landmark_bytes(shape, prompt_tokens)
        found["rebuild"] = missing * (spec.rank * shape.element_bytes + 2 * token)
        forms = spec.value_forms(shape.num_layers)
        if on_host := sum(form.placement == "host" for form in forms):
            missed = _missed_bytes(spec, shape, prompt_tokens, batch, hit_rate)
            found["fetch"] = on_host * missed
    return found


def _missed_bytes(
    spec: ShadowKVSpec, shape: ModelShape, prompt_tokens: int, batch: int, hit_rate: float
) -> float:
    """Of the values of a layer that a step selects and does not find in its buffer."""
    form, *_ = spec.value_forms(shape.num_layers)
    selected = form.data_bytes(shape, spec.keeps(prompt_tokens).selected_tokens)
    return batch * selected * (1 - hit_rate)


def phase_ms(
    spec: MethodSpec,
    shape: ModelShape,
    weight_bytes: int,
    probe: Probe,
    prompt_tokens: int,
    batch: int,
    *,
    hit_rate: float,
    lanes: int,
    micro_batches: int = 1,
) -> dict[str, float]:
    """Milliseconds of each phase of a step, and of the whole as `step`.

    Of the selected chunks `hit_rate` are at hand; each of the micro-batches has so many lanes.
    Values that lie on the host come over the bus, which must be probed then; chunks of 1 KiB are
    taken to come as fast as those of 2 KiB: a stage of the kernel holds as many bytes of them.
    """
    moved = phase_bytes(
        spec,
        shape,
        weight_bytes,
        prompt_tokens,
        batch,
        hit_rate=hit_rate,
        micro_batches=micro_batches,
    )
    layers, read = shape.num_layers, probe.memory_read_gb_s
    launches = lanes * micro_batches  # of what each lane does by itself

    def phase(name: str, launches: int, gb_s: float = read, kind: str = "") -> float:
        fixed = layers * launches * LAUNCH_US[name] / 1e3
        return fixed + moved[name] / (gb_s * 1e6 * SHARE[kind or name])

    rows_ms = layers * batch * DENSE_ROW_US / 1e3
    found = {"dense": phase("dense", micro_batches) + rows_ms}
    if not isinstance(spec, SparseSpec) or spec.is_dense(prompt_tokens):
        found["attention"] = moved["attention"] / (read * 1e6 * SHARE["full attention"])
        return found | {"step": sum(found.values())}
    found["attention"] = phase("attention", micro_batches)  # lanes' are under way together
    if isinstance(spec, ShadowKVSpec):
        tables = 1 if spec.key_buffer == spec.value_buffer else 2
        kind = "select"
        if spec.landmark_dtype == "fp8":
            several = spec.landmarks_per_chunk > 1
            kind = "select of several in fp8" if several else "select in fp8"
        found["select"] = phase("select", micro_batches, kind=kind)
        found["residency"] = layers * launches * tables * LAUNCH_US["residency"] / 1e3
        found["rebuild"] = phase("rebuild", launches)
        forms, bus = spec.value_forms(layers), probe.zero_copy_gather_gb_s or probe.h2d_gb_s
        moved["fetch"] = layers * _missed_bytes(spec, shape, prompt_tokens, batch, hit_rate)
        fetch = step = 0.0
        for placement, count in Counter(form.placement for form in forms).items():
            rate = bus if placement == "host" else read
            assert rate, "the bus is probed on every GPU"
            own = phase("fetch", launches, rate)  # were all layers of this placement
            fetch += own * count / layers
            every = found | {"fetch": own}
            if micro_batches > 1:
                step += _in_turns(every, lanes, layers * micro_batches) * count / layers
            else:
                step += _with_overlap(every, lanes, layers) * count / layers
        return found | {"fetch": fetch, "step": step}
    return found | {"step": sum(found.values())}


def _beside(phases: Mapping[str, float]) -> float:
    """Of fetching and rebuilding, which run beside each other, the longer one."""
    return max(phases["fetch"], phases["rebuild"])


def _in_turns(phases: Mapping[str, float], lanes: int, turns: int) -> float:
    """A step in which all that a micro-batch fetches hides behind the work of another.

    Either that work takes as long as the step; or the bus does, which has nothing to fetch in the
    first turn of all that a micro-batch takes in a layer.
    """
    work = phases["dense"] + phases["select"] + phases["attention"] + phases["residency"] / lanes
    return max(work, _beside(phases) + work / turns)


def _with_overlap(phases: Mapping[str, float], lanes: int, layers: int) -> float:
    """A step in which a lane fetches and rebuilds while those behind it select or attend.

    Either selection and attention take as long as that, before the last lane's fetch; or the bus
    does, which begins when the first lane's chunks are known.
    """
    select, attention, beside = phases["select"], phases["attention"], _beside(phases)
    latency = layers * LAUNCH_US["select"] / 1e3  # until a plane is ranked
    first = latency + (select - latency + phases["residency"]) / lanes
    last = select + attention + (phases["residency"] + beside) / lanes
    return phases["dense"] + max(last, first + beside + attention / lanes)
