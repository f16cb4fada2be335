"""Which rows are decoded together, and where each stands in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from shadowkv_cli.methods import Group, as_index

ROW_BUCKET = 8

Parts = Sequence[tuple[list[int], Group]]
"""Groups, each with the rows of the session that it holds."""


def row_bucket(rows: int) -> int:
    """Rows that a batch is padded to: 8, 16, 24, …"""
    return math.ceil(rows / ROW_BUCKET) * ROW_BUCKET


class Batch:
    """Rows in the order of the batch, which is theirs in the session or group by group.

    Attributes:
        parts: as given.
        rows: the session's row in each place.
        decoding: each group's places in the batch, and the group.
        index: the same places as an index into a tensor.
        bucket: rows of the batch with its padding.
        prompts: int64 [R], the prompt of each row.
    """

    def __init__(
        self, parts: Parts, device: torch.device, *, padded: bool = True, in_order: bool = True
    ) -> None:
        self.parts, self.in_order = list(parts), in_order
        prompts: dict[int, int] = {}
        for rows, group in parts:
            for index, row in enumerate(rows):
                prompts[row] = group.rows[index].prompt_index
        self.rows = sorted(prompts) if in_order else list(prompts)
        place = {row: i for i, row in enumerate(self.rows)}
        self.decoding = [([place[row] for row in rows], group) for rows, group in parts]
        self.index = [as_index(places, device) for places, _ in self.decoding]
        self.bucket = row_bucket(len(self.rows)) if padded else len(self.rows)
        self.prompts = torch.tensor([prompts[row] for row in self.rows], device=device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_capturable(self) -> bool:
        return all(group.is_capturable for _, group in self.parts)

    def without(self, ended: set[int]) -> Batch:
        """The same without groups whose rows have all ended, and with half of those half ended.

        Group by group, so that no group's rows are gathered; itself where nothing changes.
        """
        parts: list[tuple[list[int], Group]] = []
        for rows, group in self.parts:
            still = [index for index, row in enumerate(rows) if row not in ended]
            if len(still) > len(rows) // 2:
                parts.append((rows, group))
            elif still:
                parts.append(([rows[index] for index in still], group.subset(still)))
        if parts == self.parts and not self.in_order:
            return self
        return Batch(parts, self.prompts.device, padded=self.bucket > len(self), in_order=False)
