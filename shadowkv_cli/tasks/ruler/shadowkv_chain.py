"""Variable tracking as ShadowKV's authors have it (bytedance/ShadowKV a21f5a9), flaws included."""

from __future__ import annotations

import random

from shadowkv_cli.tasks.ruler.definitions import constants
from shadowkv_cli.tasks.ruler.draws import distinct_positions
from shadowkv_cli.tasks.ruler.variable_tracking import Chain, ChainDraw


class ShadowkvChainDraw(ChainDraw):
    """One example for all samples; noise that ends in newlines and is joined by spaces."""

    def _example_rng(self) -> random.Random:
        return self.bench.fixed_order()

    def _context(self, chain: Chain, noise_lines: int, fractions: list[float]) -> str:
        lines = [constants()["noise"] + "\n"] * noise_lines
        places = sorted(distinct_positions(fractions, noise_lines))
        for offset, (place, said) in enumerate(zip(places, chain.statements(), strict=True)):
            lines.insert(place + offset, said)
        return " ".join(lines).replace(". \n", ".\n")

    def _example_text(self) -> str:
        """Without the chat template, which is taken off with the last word of the question."""
        wrapper, text = self.bench.wrapper, self.task.template
        if wrapper.before or wrapper.after:
            text = " ".join((text + wrapper.after).split()[:-1])
        return text + self.task.answer_prefix
