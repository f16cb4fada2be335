"""Decode random configurations in lanes, micro-batches and graphs; compare with one lane op by op.

python -m shadowkv_cli.bench.soak --cases 100 --seed 7 --profile

All in one process, so that graphs, streams and memory come and go as in a long run. On a GPU every
logit must be the same to the bit; there it compares with one lane of as many micro-batches, since
products of fewer rows are rounded differently. The first failure ends it, with a line that repeats
it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shadowkv_cli.bench import timeline
from shadowkv_cli.bench.driven_hits import drive
from shadowkv_cli.bench.soak_cases import SoakCase, draw_case
from shadowkv_cli.bench.state import fill_synthetic
from shadowkv_cli.catalogue.shapes import SHAPES
from shadowkv_cli.errors import EXIT_FAILED, EXIT_USAGE, ShadowKVError, UsageError
from shadowkv_cli.methods.sparse import SparseGroup
from shadowkv_cli.model.fused import join_projections
from shadowkv_cli.model.loading import LoadedModel, describe, has_kernels
from shadowkv_cli.model.session import Session
from shadowkv_cli.ops.packed import NAN_BYTE

Size = Literal["large", "small"]
"""Layers as wide as Llama 3.1 8B's, or some that a sanitizer and a CPU get through."""

_FEW = {"num_hidden_layers": 3, "vocab_size": 4096}
_SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LONGEST = {"large": 16_384, "small": 1024}
"""Tokens of a prompt."""

PROFILED_AFTER = 1
"""Steps before those that the profiler sees."""
FEWEST_STEPS = PROFILED_AFTER + timeline.STEPS
FP8_NAN = 0x7F
TOLERANCE = 1e-4
"""Of a CPU, whose products are rounded by the shape of a batch, as a share of the largest logit."""


def build_model(size: Size, device: torch.device, layers: int | None = None) -> LoadedModel:
    """A random Llama, of few layers if not told: bf16 on a GPU, float32 on a CPU."""
    shape = SHAPES["llama-3.1-8b"] | (_FEW if size == "large" else _SMALL)
    if layers is not None:
        shape |= {"num_hidden_layers": layers}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**shape)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if has_kernels(device):
        join_projections(model)
    return describe(model, f"soak-{size}", random_weights=True)


class _Decoder:
    """Decodes one case's session again and again, always the same tokens."""

    def __init__(self, loaded: LoadedModel, case: SoakCase, steps: int) -> None:
        self.case, self.steps = case, steps
        case.spec.check_model(loaded.shape, loaded.dtype_name)
        lengths = case.lengths()
        self.session = Session(
            loaded,
            [case.spec],
            prompt_tokens=case.tokens,
            new_tokens=steps,
            num_prompts=case.batch,
            merge_cells=False,
        )
        self.first = fill_synthetic(self.session, lengths)
        generator = torch.Generator().manual_seed(case.seed)
        tokens = torch.randint(loaded.vocab_size, (steps, case.batch), generator=generator)
        self.tokens = tokens.to(loaded.device)
        (_, group), *_ = self.session.groups
        assert isinstance(group, SparseGroup)
        self.group = group

    def prepare(self, lanes: int, micro_batches: int, *, captures: bool) -> None:
        """Decode in so many lanes from now on; captures the step, if it is to be a graph."""
        self.session.focus(
            self.case.spec, lanes=lanes, captures=captures, micro_batches=micro_batches
        )
        if self.case.drift:
            drive(self.session, self.first, 0.0, 0, self.steps, known=self.case.drift)
        with self.session.attached():
            self.session.next_tokens(self.first)
        on_gpu = has_kernels(self.session.loaded.device)
        if self.session.is_captured != (captures and on_gpu):
            raise ShadowKVError(f"a step in {lanes} lanes was not captured as it should be")

    def decode(self, how: str) -> tuple[Tensor, float]:
        """Logits [steps, R, V], and the share of the chunks that were at hand after one step.

        Raises ShadowKVError, which says how it was decoded, where logits are not finite.
        """
        self.session.reset()
        self._poison()
        if self.session.drift is not None:
            self.session.drift.restart()
        torch.manual_seed(self.case.seed)  # of the drift's noise, in a graph as without one
        found = []
        with self.session.attached():
            for tokens in self.tokens:
                stepped = self.session.next_tokens(tokens)
                found.append(stepped.logits.clone())
        logits = torch.stack(found)
        if not bool(torch.isfinite(logits).all()):
            raise ShadowKVError(f"{how}: logits are not finite")
        return logits, self.session.hit_rate(2, self.steps) or 0.0

    @torch.inference_mode()
    def _poison(self) -> None:
        """Leave nothing in the buffers that was right before and would be right now."""
        for space in (*self.group.keys, *self.group.values):
            self.group.buffer(space).fill_(float("nan"))
        poison = FP8_NAN if self.group.value_scales else NAN_BYTE
        for buffer in self.group.value_buffers:
            buffer.view(torch.uint8).fill_(poison)
        for scales in self.group.value_scales:
            scales.fill_(float("nan"))


def _compare(found: tuple[Tensor, float], expected: tuple[Tensor, float], how: str) -> None:
    """Raises ShadowKVError where logits or hits are not the same."""
    logits, truth = found[0], expected[0]
    difference = (logits - truth).abs().amax((1, 2))  # [steps]
    allowed = 0.0 if logits.is_cuda else TOLERANCE * float(truth.abs().max())
    wrong = (difference > allowed).nonzero()[:, 0].tolist()
    if wrong:
        raise ShadowKVError(
            f"{how}: logits of {len(wrong)} of {len(difference)} steps differ, first in step "
            f"{wrong[0] + 1} by {float(difference[wrong[0]]):.3g}"
        )
    if logits.is_cuda and found[1] != expected[1]:
        raise ShadowKVError(f"{how}: {found[1]:.4f} of the chunks hit, not {expected[1]:.4f}")


def run_case(
    loaded: LoadedModel, case: SoakCase, steps: int, *, graph: bool, profile: bool
) -> float:
    """Decode a case in all its ways; returns its hit rate.

    Args:
        loaded: from `build_model`.
        case: what to decode.
        steps: tokens, at least FEWEST_STEPS.
        graph: capture steps, on a GPU; a sanitizer that watches each allocation cannot.
        profile: look at captured steps with the profiler, as bench does, and decode once more.

    Raises:
        ShadowKVError: logits or hits differ, or are not finite.
        torch.AcceleratorError: the device failed.
    """
    decoder = _Decoder(loaded, case, steps)
    on_gpu = loaded.device.type == "cuda"
    decoder.prepare(1, case.micro_batches if on_gpu else 1, captures=False)
    expected = decoder.decode("op by op")
    for lanes in case.lanes:
        how = f"{lanes} lanes"
        if case.micro_batches > 1:
            how += f", {case.micro_batches} micro-batches"
        decoder.prepare(lanes, case.micro_batches, captures=graph)
        _compare(decoder.decode(how), expected, how)
        if profile and decoder.session.is_captured:
            timeline.phase_ms(decoder.session, decoder.first, PROFILED_AFTER)
            how += " after the profiler"
            _compare(decoder.decode(how), expected, how)
    if on_gpu:
        torch.cuda.synchronize(loaded.device)
    return expected[1]


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=30, help="random configurations")
    parser.add_argument("--seconds", type=float, help="begin no further one after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="one configuration, as a failure prints it")
    parser.add_argument("--size", choices=get_args(Size), help="large on a GPU, else small")
    parser.add_argument("--layers", type=int, help="of the model; few if left out")
    parser.add_argument("--steps", type=int, default=24, help="tokens that are decoded")
    parser.add_argument("--profile", action="store_true", help="run the profiler in between")
    parser.add_argument("--no-graph", action="store_true", help="never capture a step")
    args = parser.parse_args(given)
    if args.cases < 1 or args.steps < FEWEST_STEPS or (args.layers is not None and args.layers < 1):
        parser.error(f"--cases and --layers must be at least 1, --steps at least {FEWEST_STEPS}")
    if args.profile and args.no_graph:
        parser.error("--profile looks at graphs: leave --no-graph out")
    return args


def _repeat(args: argparse.Namespace, case: SoakCase) -> str:
    options = f" --size {args.size} --steps {args.steps}"
    options += "" if args.layers is None else f" --layers {args.layers}"
    options += " --profile" * args.profile + " --no-graph" * args.no_graph
    return f"python -m shadowkv_cli.bench.soak{options} --case '{case.text}'"


def main(given: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    args = _arguments(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.size = args.size or ("large" if device.type == "cuda" else "small")
    started, draws, failed = time.perf_counter(), random.Random(args.seed), ""
    try:
        cases = [SoakCase.parse(args.case)] if args.case else []
        loaded = build_model(args.size, device, args.layers)
        if not cases:
            longest = LONGEST[args.size]
            cases = [draw_case(draws, loaded.shape, longest) for _ in range(args.cases)]
        for place, case in enumerate(cases, start=1):
            began = time.perf_counter()
            if args.seconds is not None and place > 1 and began - started > args.seconds:
                print(f"{place - 1} of {len(cases)} cases after {args.seconds:g} s, no failure")
                return 0
            print(f"{place}/{len(cases)} {case.text}", flush=True)
            try:
                hits = run_case(
                    loaded, case, args.steps, graph=not args.no_graph, profile=args.profile
                )
            except UsageError:
                raise
            except (ShadowKVError, torch.AcceleratorError, torch.OutOfMemoryError) as error:
                failed = " ".join(str(error).split()) or type(error).__name__
            if failed:
                print(f"FAILED: {failed}\nRepeat: {_repeat(args, case)}", file=sys.stderr)
                return EXIT_FAILED
            print(f"  the same; {hits:.0%} hits, {time.perf_counter() - began:.1f} s", flush=True)
    except UsageError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    print(f"{len(cases)} cases, no failure, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
