"""The training loop: stages, learning rate, curves, checkpoints."""

from __future__ import annotations

import csv
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from shadowkv_cli.console import notice
from shadowkv_cli.train_demo.batches import Batch, Job
from shadowkv_cli.train_demo.curriculum import GATES, PAIRS, REPEATS, Stage
from shadowkv_cli.train_demo.network import Network
from shadowkv_cli.train_demo.optimizer import Muon, split_parameters
from shadowkv_cli.train_demo.prefetch import Prefetch

CHECKPOINT = "checkpoint.pt"
CURVES = "curves.csv"
MATRIX_RATE, OTHER_RATE = 0.01, 2e-3
WARM_UP_STEPS = 100
DECAY_FROM, LAST_RATE = 0.6, 0.03
"""The rate is constant up to that share of the time, then falls to that share of itself."""
SMOOTHING = 0.98
MEASURE_EVERY, REPORT_EVERY = 5, 100
LEAST_STEPS = 150
"""Steps of a stage before it can end early."""
EASY_SHARE = 0.2
"""A task that is always right keeps this share of its weight."""
STAGE_DECIMALS = 2
WARM_UP_LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """How long and where to train.

    Attributes:
        seed: of weights and data.
        seconds: training time in all, over which stages and rates are planned; None plans by steps.
        steps: the same in steps.
        pause: seconds (or steps) after which this call stops; the next one goes on.
        workers: processes that make batches; 0 for this one.
        rate: share of the full learning rates.
        decay_from: share of the time up to which the rates are constant.
    """

    seed: int
    output: Path
    seconds: float | None = None
    steps: int | None = None
    pause: float | None = None
    workers: int = 0
    rate: float = 1.0
    decay_from: float = DECAY_FROM


@dataclass
class Progress:
    """Where the training stands; saved with the weights."""

    step: int = 0
    spent: float = 0.0
    stage: int = 0
    stage_from: float = 0.0
    stage_step: int = 0
    exact_match: dict[str, float] = field(default_factory=dict)
    token_match: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a model through stages; can stop anywhere and go on."""

    def __init__(
        self, model: LlamaForCausalLM, stages: tuple[Stage, ...], settings: Settings
    ) -> None:
        assert (settings.seconds is None) != (settings.steps is None), "either seconds or steps"
        self.model = model
        self.stages = stages
        self.settings = settings
        self.device = model.device
        cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        self.network = Network(model, dtype=dtype, compiled=cuda)
        matrices, others = split_parameters(model)
        self.muon = Muon(matrices, momentum=0.95, decay=0.02)
        self.adam = torch.optim.AdamW(
            others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda
        )
        self.progress = Progress()

    def share_done(self) -> float:
        total = self.settings.seconds or self.settings.steps
        assert total is not None
        return min(self._spent() / total, 1.0)

    def _spent(self) -> float:
        return self.progress.spent if self.settings.seconds else float(self.progress.step)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.progress = Progress(**state["progress"])

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "progress": asdict(self.progress),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def job_for(self, step: int) -> Job:
        """The batch of a step, as far as the training is by now."""
        stage = self.stages[self.progress.stage]
        rng = random.Random(f"{self.settings.seed}/{step}/length")
        lengths, shares = zip(*stage.lengths, strict=True)
        length = rng.choices(lengths, shares)[0]
        tasks = stage.tasks(length)
        weights = {
            task: stage.weight(task, length)
            * (EASY_SHARE + 1 - round(self.progress.exact_match.get(task, 0.0), STAGE_DECIMALS))
            for task in tasks
        }
        others = 1 - stage.repeats - stage.pairs
        total = sum(weights.values())
        mix = [(task, others * weight / total) for task, weight in weights.items()]
        mix += [(REPEATS, stage.repeats), (PAIRS, stage.pairs)]
        return Job(
            seed=self.settings.seed,
            step=step,
            rows=max(stage.tokens // length, 1),
            length=length,
            weights=tuple((name, weight) for name, weight in mix if weight > 0),
            exact=stage.exact,
            gap=stage.gap,
        )

    def warm_up(self) -> None:
        """Compile for every number of ids in a step, so that no training time is spent on it."""
        for tokens in sorted({stage.tokens for stage in self.stages}):
            ids = torch.zeros((tokens // WARM_UP_LENGTH, WARM_UP_LENGTH), device=self.device)
            self.network.hidden(ids.long()).sum().backward()

    def run(self) -> bool:
        """Train until the pause or the end; True at the end."""
        prefetch = Prefetch(self.job_for, self.progress.step, self.settings.workers)
        if self.device.type == "cuda":
            self.warm_up()
        path = self.settings.output / CURVES
        new = not path.exists()
        pause = self.settings.pause
        limit = None if pause is None else self._spent() + pause
        try:
            job, batch = prefetch.next()  # waits for the workers to start
            with path.open("a", newline="") as file:
                curves = csv.writer(file)
                if new:
                    curves.writerow(["step", "seconds", "stage", "length", "loss", "task", "exact"])
                clock = time.perf_counter()
                while self.share_done() < 1 and (limit is None or self._spent() < limit):
                    loss = self._step(job, batch)
                    now = time.perf_counter()
                    self.progress.spent += now - clock
                    clock = now
                    self.progress.step += 1
                    self._advance()
                    if self.progress.step % REPORT_EVERY == 0:
                        self._report(curves, job, float(loss))
                        file.flush()
                    job, batch = prefetch.next()
        finally:
            prefetch.close()
        self.save(self.settings.output / CHECKPOINT)
        return self.share_done() >= 1

    def rate(self) -> float:
        """Share of the full learning rates for the next step."""
        done = self.share_done()
        begin = self.settings.decay_from
        fall = 1 - (1 - LAST_RATE) * max(done - begin, 0) / (1 - begin)
        return self.settings.rate * min(1.0, (self.progress.step + 1) / WARM_UP_STEPS) * fall

    def _step(self, job: Job, batch: Batch) -> torch.Tensor:
        ids, targets = self._move(batch.ids), self._move(batch.targets)
        hidden = self.network.hidden(ids)
        # The id at place i is predicted from the place before it; rows start with a BOS.
        logits = self.network.logits(hidden.index_select(0, targets - 1))
        wanted = ids.reshape(-1)[targets]
        losses = F.cross_entropy(logits, wanted, reduction="none")
        loss = (losses * self._move(batch.weights)).sum()
        for parameter in self.model.parameters():
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.rate()
        for group in self.adam.param_groups:
            group["lr"] = OTHER_RATE * rate
        self.adam.step()
        self.muon.step(MATRIX_RATE * rate)
        if self.progress.step % MEASURE_EVERY == 0:
            self._measure(batch, logits.argmax(-1) == wanted)
        return loss.detach()

    def _move(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _measure(self, batch: Batch, right: torch.Tensor) -> None:
        """Update the moving averages of exact match and of right ids."""
        by_id = right.cpu().numpy()
        totals: dict[str, list[list[float]]] = {}
        size = len(batch.group_tasks)
        number = np.bincount(batch.groups, minlength=size)
        hits = np.bincount(batch.groups, weights=by_id, minlength=size)
        for task, n, hit in zip(batch.group_tasks, number, hits, strict=True):
            totals.setdefault(task, []).append([float(n == hit), float(hit / n)])
        keep = SMOOTHING**MEASURE_EVERY
        for task, values in totals.items():
            means = np.mean(values, axis=0)
            share = keep ** min(len(values) / 8, 1.0)
            for store, mean in zip(
                (self.progress.exact_match, self.progress.token_match), means, strict=True
            ):
                store[task] = share * store.get(task, 0.0) + (1 - share) * float(mean)

    def _advance(self) -> None:
        """Go to the next stage when this one is learned, or its time is up."""
        progress = self.progress
        stage = self.stages[progress.stage]
        if progress.stage == len(self.stages) - 1:
            return
        known = progress.exact_match
        if stage.repeats == 1:
            reached = progress.token_match.get(REPEATS, 0.0)
        elif stage.repeats + stage.pairs >= 1:
            reached = known.get(PAIRS, 0.0)
        else:
            longest = max(length for length, _ in stage.lengths)
            reached = min(known.get(task, 0.0) for task in GATES if task in stage.tasks(longest))
        steps = progress.step - progress.stage_step
        out_of_time = self.share_done() - progress.stage_from >= stage.share
        if out_of_time or (reached >= stage.enough and steps >= LEAST_STEPS):
            notice(
                f"Stage '{stage.name}' ends at step {progress.step}, {progress.spent:.0f} s, "
                f"at {reached:.3f}."
            )
            progress.stage += 1
            progress.stage_from = self.share_done()
            progress.stage_step = progress.step

    def _report(self, curves: Any, job: Job, loss: float) -> None:
        progress = self.progress
        stage = self.stages[progress.stage].name
        for task, value in sorted(progress.exact_match.items()):
            curves.writerow(
                [
                    progress.step,
                    f"{progress.spent:.1f}",
                    stage,
                    job.length,
                    f"{loss:.4f}",
                    task,
                    f"{value:.4f}",
                ]
            )
        scores = " ".join(
            f"{task.removeprefix('niah_')} {value:.2f}"
            for task, value in sorted(progress.exact_match.items())
        )
        tokens = progress.token_match.get(REPEATS, 0.0)
        notice(
            f"{progress.spent:.0f} s, step {progress.step}, {stage}, loss {loss:.3f}: {scores} "
            f"(repeats by id {tokens:.2f})"
        )
