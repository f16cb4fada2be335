"""How fast each compiled op is on a GPU, beside the bandwidth that was measured in the same run.

    python -m shadowkv_cli.bench.op_speed --batch-size 1,8,14 --context-length 122880

One layer of the Llama-3.1-8B shape: 8 KV heads, 4 query heads each, head dimension 128. A CUDA
graph of 20 launches is replayed; each launch takes the next of several copies of its inputs, so
that the second-level cache is cold. Batches whose inputs do not fit are left out, and said so.
SDPA's flash kernel stands beside `full_attention`; `--reference` times the torch references, too,
which takes longer than all the rest.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shadowkv_cli.bench import probes
from shadowkv_cli.config import packed_width, parse_token_count, split_list
from shadowkv_cli.console import notice, print_json, print_table
from shadowkv_cli.environment import PACKAGE_DIR, git_state
from shadowkv_cli.methods.pinned import HostMemory
from shadowkv_cli.ops import cases, compiled, layer_cases
from shadowkv_cli.ops.fp8 import FP8
from shadowkv_cli.ops.sizes import Arguments, Sizes

LAUNCHES, REPLAYS = 20, 5
COLD_BYTES = 400e6
"""Inputs rotate until that many bytes lie between two uses: several times an H100's cache."""

MISSES = 0.4
"""Share of the selected chunks that are fetched and rebuilt."""

FROM_HOST, FROM_HOST_FP8 = "fetch_values (host)", "fetch_values (host, fp8)"
FROM_HOST_PACKED, SPARSE_PACKED = "fetch_values (host, packed)", "sparse_attention (packed)"
WAITING = {"await_rows"}
"""What moves nothing."""
SELECT_FP8, SPARSE_FP8 = "select_chunks (fp8)", "sparse_attention (fp8)"
SELECT_PACKED = "select_chunks (packed)"
SDPA_FLASH = "full_attention (SDPA flash)"
VARIANTS = (
    *(FROM_HOST, FROM_HOST_FP8, FROM_HOST_PACKED),
    *(SELECT_FP8, SELECT_PACKED, SPARSE_FP8, SPARSE_PACKED, SDPA_FLASH),
)
"""Ops whose inputs lie elsewhere or in another dtype, and what stands beside one of ours."""

COLUMN_OPS = {
    "gated_silu": layer_cases.gate_arguments,
    "rms_norm": layer_cases.norm_arguments,
    "rotate_heads": layer_cases.rotate_arguments,
    "rotate_heads_": layer_cases.rotate_arguments,
}
"""Measured on all tokens of one prompt as well as on one token a row."""


def sizes_of(rows: int, tokens: int, chunk_size: int, budget: int, rank: int) -> Sizes:
    return Sizes(
        rows=rows,
        prompts=rows,
        heads=8,
        group=4,
        dim=128,
        chunks=tokens // chunk_size,
        chunk_size=chunk_size,
        wanted=budget // chunk_size,
        slots=2 * budget // chunk_size,
        rank=rank,
        spare=0,
        pairs=64,
        fixed=(384, 32, 256),
        poison=False,
    )


def tokens_of(op: str, s: Sizes) -> int:
    """Tokens that an op on the columns of a matrix product serves at once."""
    return s.tokens if op.endswith("(prompt)") else s.rows


def moved_bytes(op: str, s: Sizes) -> float:
    """Bytes that must be read and written once, indices left out."""
    op = "full_attention" if op == SDPA_FLASH else op
    element, planes = 2, s.rows * s.heads
    token, at_once = s.dim * element, tokens_of(op, s)
    chosen = s.wanted * s.chunk_size
    missed = planes * chosen * MISSES
    attended = planes * (2 * sum(s.fixed) + chosen) * token  # all but the values of chunks
    rotated = 2 * at_once * (s.heads * (s.group + 1) * token + s.pairs * element)
    return {
        "append_tokens": 4 * planes * token,
        "build_landmarks": s.heads * (s.tokens + s.chunks) * token,
        "select_chunks": planes * s.chunks * (token * s.landmarks + 1),
        SELECT_FP8: planes * s.chunks * ((s.dim + 4) * s.landmarks + 1),
        SELECT_PACKED: planes * s.chunks * (packed_width(s.dim) * s.landmarks + 1),
        "update_residency": planes * (s.wanted * 9 + s.slots * 8),
        "fetch_values": 2 * missed * token,
        FROM_HOST: missed * token,
        FROM_HOST_FP8: missed * s.dim,
        FROM_HOST_PACKED: missed * packed_width(s.dim),
        "rebuild_keys": missed * (s.rank * element + token) + planes * s.rank * token,
        "sparse_attention": attended + planes * chosen * token,
        SPARSE_FP8: attended + planes * (chosen * s.dim + 4 * s.wanted),
        SPARSE_PACKED: attended + planes * chosen * packed_width(s.dim),
        "full_attention": 2 * planes * s.tokens * token,
        "gated_silu": 3 * at_once * s.inner * element,
        "rms_norm": (2 * at_once + 1) * s.hidden * element,
        "rotate_heads": rotated,
        "rotate_heads_": rotated,
    }[op.removesuffix(" (prompt)")]


def input_bytes(op: str, s: Sizes) -> float:
    """Bytes of one copy of the arguments on the GPU, roughly."""
    op = "full_attention" if op == SDPA_FLASH else op
    token, planes = s.dim * 2, s.rows * s.heads
    buffers = planes * (sum(s.fixed) + s.slots * s.chunk_size) * token
    return {
        "append_tokens": 2 * planes * s.tokens * token,
        "build_landmarks": s.heads * s.tokens * token,
        "fetch_values": planes * s.tokens * token + buffers,
        FROM_HOST: buffers,
        FROM_HOST_FP8: buffers,
        FROM_HOST_PACKED: buffers,
        "rebuild_keys": s.rows * s.tokens * s.rank * 2 + buffers,
        "sparse_attention": 2 * buffers,
        "full_attention": 2 * planes * s.tokens * token,
    }.get(op, moved_bytes(op, s))


class HostValues:
    """Pinned values for the largest batch: pinned once, for pinning takes long."""

    def __init__(self, largest: Sizes) -> None:
        values = (largest.prompts, largest.heads, largest.tokens, largest.dim)
        self.memory = HostMemory(pinned=True)
        count = math.prod(values) * largest.dtype.itemsize
        [self.bytes] = self.memory.take(((count,), torch.uint8))

    def chunks(self, s: Sizes) -> Tensor:
        """[P, Hk, C, c, D] of the dtype that values of these sizes are kept in, or packed."""
        dtype = torch.uint8 if s.packed else FP8 if s.fp8 else s.dtype
        width = packed_width(s.dim) if s.packed else s.dim
        size = (s.prompts, s.heads, s.chunks, s.chunk_size, width)
        return self.bytes[: math.prod(size) * dtype.itemsize].view(dtype).view(size)


def make(op: str, s: Sizes, held: HostValues) -> Arguments:
    s = replace(s, fp8=op.endswith("fp8)"), packed=op.endswith("packed)"))
    if op == "fetch_values":
        return cases.fetch_arguments(s, share=MISSES)
    if op in (FROM_HOST, FROM_HOST_FP8, FROM_HOST_PACKED):
        # The values that are drawn for one prompt are not used.
        given = cases.fetch_arguments(replace(s, prompts=1), share=MISSES)
        scales = given["scales"]
        return given | {
            "values": held.chunks(s),
            "scales": scales.repeat(s.prompts, 1, 1) if s.fp8 else None,
            "prompt_index": s.prompt_index(s.generator()),
        }
    if op == SDPA_FLASH:
        given = cases.full_arguments(s)
        return given | {key: given[key][:, :, : s.tokens] for key in ("keys", "values")}
    if op == "rebuild_keys":
        return cases.rebuild_arguments(s, share=MISSES)
    if op in COLUMN_OPS:
        return COLUMN_OPS[op](s, tokens=1)
    if op.endswith("(prompt)"):
        alone = replace(s, rows=1, prompts=1)
        return COLUMN_OPS[op.partition(" ")[0]](alone, tokens=s.tokens)
    return cases.ARGUMENTS[op.partition(" ")[0]](s)


def graph_ms(run: Callable[[int], Any]) -> float:
    """Median milliseconds of one launch, of replays of a graph of `LAUNCHES`."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            run(i)
    return event_ms(graph.replay, REPLAYS) / LAUNCHES


def event_ms(work: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a piece of work, by CUDA events, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def _sdpa_flash(
    query: Tensor, keys: Tensor, values: Tensor, prompt_index: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """What `full_attention` does, for rows of one length, each with a prompt of its own."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            query[:, :, None], keys, values, scale=scale, enable_gqa=True
        )


def _kernel_of(op: str) -> Callable[..., Any]:
    if op == SDPA_FLASH:
        return _sdpa_flash
    found: Callable[..., Any] = getattr(torch.ops.shadowkv, op.partition(" ")[0])
    return found


def measure(
    op: str,
    s: Sizes,
    held: HostValues,
    peak_gb_s: float,
    bus_gb_s: float,
    *,
    reference: bool = False,
) -> dict[str, Any]:
    """One row of the table: the op's time, bandwidth and share of the peak.

    Args:
        op: its name, and in brackets where its inputs lie or how many there are.
        s: sizes.
        held: values in host memory.
        peak_gb_s, bus_gb_s: what the memory and the bus were probed to reach.
        reference: time the torch reference, too; SDPA has none.
    """
    name, kernel = op.partition(" ")[0], _kernel_of(op)
    first = make(op, s, held)
    inputs = [first]
    copies = 1 + int(COLD_BYTES // input_bytes(op, s)) if "residency" not in op else 1
    for _ in range(min(copies, LAUNCHES) - 1):
        # Values in host memory are shared: the bus has no cache.
        inputs.append({k: _copy(v) for k, v in first.items()})
    if name == "update_residency":
        kernel_ms = residency_ms(s)
    else:
        kernel_ms = graph_ms(lambda i: kernel(*inputs[i % len(inputs)].values()))
    torch_ms = None
    if reference and op != SDPA_FLASH:
        plain = importlib.import_module(f"shadowkv_cli.ops.{name.rstrip('_')}")._reference
        torch_ms = event_ms(lambda: plain(*first.values()), 1)
    speed = moved_bytes(op, s) / kernel_ms / 1e6
    return {
        "op": op,
        "batch_size": s.rows,
        "ms": kernel_ms,
        "torch_ms": torch_ms,
        "mb": moved_bytes(op, s) / 1e6,
        "gb_s": speed,
        "share_of_peak": speed / (bus_gb_s if "host" in op else peak_gb_s),
    }


def _copy(value: Any) -> Any:
    """A copy on the GPU with the same strides; what lies elsewhere is shared."""
    if not (isinstance(value, Tensor) and value.is_cuda):
        return value
    size = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return value.new_empty(size).as_strided(value.shape, value.stride()).copy_(value)


def residency_ms(s: Sizes) -> float:
    """Steps in which the share `MISSES` of the chunks is new, one after the other."""
    tables = cases.residency_arguments(s)
    ids, new = [tables["ids"]], int(MISSES * s.wanted)
    generator = s.generator()
    for _ in range(LAUNCHES - 1):
        mixed = torch.rand(s.rows, s.heads, s.chunks, generator=generator, device=s.device)
        mixed.scatter_(2, ids[-1][..., new:].long(), 2.0)
        ids.append(mixed.topk(s.wanted).indices.sort(-1).values.to(torch.int32))
    held = [tables[key] for key in ("chunk_of_slot", "last_used", "slot_of_chunk")]
    steps = [tables["step"] + i for i in range(LAUNCHES)]
    return graph_ms(lambda i: torch.ops.shadowkv.update_residency(ids[i], steps[i], *held))


def measure_all(
    sizes: Sequence[Sizes], *, reference: bool = False
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Every op at every size that fits, and the peaks of this run in GB/s."""
    device = torch.device("cuda")
    peak = probes.measure(device, ())
    bus = peak.h2d_gb_s or 1.0
    held = HostValues(max(sizes, key=lambda s: s.prompts))
    rows = []
    for s in sizes:
        ops = [
            *(cases.ARGUMENTS.keys() - WAITING),
            *VARIANTS,
            *(f"{op} (prompt)" for op in COLUMN_OPS),
        ]
        for op in sorted(ops):
            if (op == "build_landmarks" or "(prompt)" in op) and s is not sizes[0]:
                continue  # one prompt at a time, whatever the batch
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            # Random numbers are drawn in float32 before they are rounded.
            if input_bytes(op, s) * 2.6 > free:
                notice(f"{op} at batch {s.rows} does not fit.")
                continue
            started = time.perf_counter()
            rows.append(measure(op, s, held, peak.memory_read_gb_s, bus, reference=reference))
            notice(f"{op} at batch {s.rows}: {time.perf_counter() - started:.1f} s")
    return rows, {"memory_read_gb_s": peak.memory_read_gb_s, "h2d_gb_s": bus}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--batch-size", default="1,8,14")
    parser.add_argument("--context-length", default="122880")
    parser.add_argument("--chunk-size", type=int, default=8)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--reference", action="store_true", help="time the torch references, too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if compiled.ABSENT or not torch.cuda.is_available():
        parser.error(f"a GPU and the kernels are needed; kernels: {compiled.ABSENT or 'here'}")
    tokens = parse_token_count(args.context_length)
    sizes = [
        sizes_of(int(batch), tokens, args.chunk_size, args.budget, args.rank)
        for batch in split_list([args.batch_size])
    ]
    rows, peaks = measure_all(sizes, reference=args.reference)
    name = torch.cuda.get_device_name()
    if args.json:
        git = git_state(PACKAGE_DIR)
        command = ["python", "-m", "shadowkv_cli.bench.op_speed", *sys.argv[1:]]
        facts = {"device": name, "git": git, "command": command, **peaks}
        facts |= {"context_length": tokens}
        print_json({**facts, "results": rows})
        return
    table = [
        [
            r["op"],
            str(r["batch_size"]),
            f"{r['ms']:.4f}",
            "-" if r["torch_ms"] is None else f"{r['torch_ms']:.3f}",
            f"{r['mb']:.1f}",
            f"{r['gb_s']:.0f}",
            f"{100 * r['share_of_peak']:.1f}%",
        ]
        for r in rows
    ]
    columns = ["op", "batch", "ms", "torch ms", "MB", "GB/s", "of peak"]
    notes = [
        f"Peaks of this run: memory read {peaks['memory_read_gb_s']:.0f} GB/s, bus "
        f"{peaks['h2d_gb_s']:.1f} GB/s (of which host rows are a share). Misses: {MISSES:.0%}."
    ]
    print_table(f"One layer on {name}, {tokens:,} tokens", columns, table, notes)


if __name__ == "__main__":
    main()
