"""Make samples in this process or in several; the order of the rows is the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from shadowkv_cli.processes import submit, worker_pool
from shadowkv_cli.tasks.rows import Sample
from shadowkv_cli.tasks.ruler.draws import Variant, Workbench
from shadowkv_cli.tasks.ruler.fit import Calibration
from shadowkv_cli.tasks.ruler.samples import make_sample
from shadowkv_cli.tasks.ruler.sources import Sources
from shadowkv_cli.tasks.tokenization import load_tokenizer
from shadowkv_cli.tasks.wrappers import Wrapper

AHEAD = 4
"""Samples per worker that may be made before they are written."""


@dataclass(frozen=True)
class TokenizerName:
    """How to load the tokenizer again in another process."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    offline: bool = False

    def load(self) -> object:
        return load_tokenizer(
            self.name,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            offline=self.offline,
        )


@dataclass(frozen=True)
class Job:
    """One sample that is to be made."""

    task: str
    context_length: int
    index: int
    calibration: Calibration


_bench: Workbench | None = None


def _start_worker(
    tokenizer: TokenizerName, wrapper: Wrapper, sources: Sources, seed: int, variant: Variant
) -> None:
    global _bench
    _bench = Workbench(tokenizer.load(), wrapper, sources, seed, variant)


def _run(job: Job) -> Sample:
    assert _bench is not None, "the worker was not started"
    return make_sample(_bench, job.task, job.context_length, job.index, job.calibration)


def make_samples(
    bench: Workbench, tokenizer: TokenizerName, jobs: Iterable[Job], num_workers: int
) -> Generator[Sample, None, None]:
    """Yield the samples of the jobs in their order."""
    if num_workers == 1:
        for job in jobs:
            yield make_sample(bench, job.task, job.context_length, job.index, job.calibration)
        return
    start = (tokenizer, bench.wrapper, bench.sources, bench.seed, bench.variant)
    with worker_pool(num_workers, _start_worker, start) as pool:
        waiting: deque[Future[Sample]] = deque()
        for job in jobs:
            waiting.append(submit(pool, _run, job))
            if len(waiting) >= AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
