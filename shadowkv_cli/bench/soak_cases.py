"""Random configurations of decoding, each of which one line of text says how to repeat."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from shadowkv_cli.cells import build_specs
from shadowkv_cli.config import ModelShape, ShadowKVSpec
from shadowkv_cli.errors import UsageError

MOST_ROWS, MOST_LANES, MOST_MICRO_BATCHES = 16, 16, 2


@dataclass(frozen=True)
class SoakCase:
    """One session, decoded in one way after the other.

    Attributes:
        batch: prompts.
        lanes: numbers of lanes, in turn.
        micro_batches: parts of the batch that have so many lanes each.
        tokens: of the longest prompt; the others have half of it or more.
        drift: one minus the correlation of neighbouring steps' selecting queries; 0: those of the
            model select.
        seed: of the lengths, the tokens and the drift's noise.
        method: of ShadowKV, as `--method` has it.
    """

    batch: int
    lanes: tuple[int, ...]
    micro_batches: int
    tokens: int
    drift: float
    seed: int
    method: str

    @property
    def text(self) -> str:
        """All fields on one line."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["lanes"] = ",".join(map(str, self.lanes))
        return " ".join(f"{name}={value}" for name, value in values.items())

    @classmethod
    def parse(cls, text: str) -> SoakCase:
        """The case that a line says. Raises UsageError for any other line."""
        given = dict(part.partition("=")[::2] for part in text.split())
        names = [f.name for f in fields(cls)]
        if sorted(given) != sorted(names):
            raise UsageError(f"--case '{text}' must say {', '.join(names)}, each as name=value.")
        try:
            case = cls(
                batch=int(given["batch"]),
                lanes=tuple(int(count) for count in given["lanes"].split(",")),
                micro_batches=int(given["micro_batches"]),
                tokens=int(given["tokens"]),
                drift=float(given["drift"]),
                seed=int(given["seed"]),
                method=given["method"],
            )
        except ValueError:
            raise UsageError(f"--case '{text}' has a value that is no number.") from None
        least = min(case.batch, *case.lanes, case.micro_batches)
        if least < 1 or case.tokens < 2 or not 0 <= case.drift <= 1:
            raise UsageError(f"--case '{text}' has a value out of range.")
        return case

    @property
    def spec(self) -> ShadowKVSpec:
        """Raises UsageError where the method is none of ShadowKV."""
        specs = build_specs([self.method], {})
        if len(specs) != 1 or not isinstance(specs[0], ShadowKVSpec):
            raise UsageError(f"'{self.method}' is no method of ShadowKV.")
        return specs[0]

    def lengths(self) -> list[int]:
        """Tokens of each prompt; the first is the longest."""
        draws = random.Random(self.seed)
        others = (draws.randint(-(-self.tokens // 2), self.tokens) for _ in range(self.batch - 1))
        return [self.tokens, *others]


def draw_case(draws: random.Random, shape: ModelShape, longest: int) -> SoakCase:
    """A configuration that a model of that shape serves.

    Args:
        draws: random numbers.
        shape: of the model.
        longest: tokens of a prompt, at least 1,024: shorter ones are attended as a whole.
    """
    tokens = draws.randint(longest // 2, longest)
    chunk_size = draws.choice((2, 4, 8, 8, 16))
    # A quarter of the shortest prompt at most is selected, so that buffers of 4 times have room.
    budget = chunk_size * draws.randint(1, max(1, tokens // 8 // chunk_size))
    one_table = draws.random() < 0.5
    value_buffer = draws.choice((1, 1.5, 2, 4))
    key_buffer = value_buffer if one_table else draws.choice((1, 2, 3))
    placement = draws.choice(("host", "host", "host", "device"))
    packed = "packed" if shape.element_bytes == 2 else "model"  # what it packs is bfloat16
    settings = {
        "sparse_budget": budget,
        "chunk_size": chunk_size,
        "rank": draws.randint(1, min(shape.key_width, 200)),
        "landmarks_per_chunk": draws.choice([n for n in (1, 1, 2, 4) if chunk_size % n == 0]),
        "outlier_chunks": draws.randint(0, 6),
        "value_placement": placement,
        "value_buffer": value_buffer,
        "key_buffer": key_buffer,
        "value_dtype": draws.choice(("model", packed, "fp8")),
        "landmark_dtype": draws.choice(("model", packed, "fp8")),
        "resident_layers": draws.choice((0, 0, 1)) if placement == "host" else 0,
    }
    batch = draws.randint(1, MOST_ROWS)
    return SoakCase(
        batch=batch,
        lanes=tuple(draws.randint(1, min(batch, MOST_LANES)) for _ in range(2)),
        micro_batches=draws.randint(1, min(batch, MOST_MICRO_BATCHES)),
        tokens=tokens,
        drift=draws.choice((0.0, 0.001, 0.01, 0.1, 1.0)),
        seed=draws.randrange(1_000_000),
        method="shadowkv:" + ",".join(f"{name}={value}" for name, value in settings.items()),
    )
