"""Shared by the tests: a small model in a folder, and data that its tokenizer fitted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shadowkv_cli.bench import probes
from shadowkv_cli.cli import run
from shadowkv_cli.environment import usable_cores
from shadowkv_cli.tasks.tokenization import load_tokenizer

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    # Threads that wait for each other's cores make everything many times slower.
    torch.set_num_threads(max(1, usable_cores() // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of commands that tests run


def save_tiny_model(path: Path, **changes) -> Path:
    """A random Llama of two layers that reads the demo tokenizer's text."""
    tokenizer = load_tokenizer("demo")
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def probes_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "probes.json"


@pytest.fixture(autouse=True)
def probes_are_not_kept(monkeypatch: pytest.MonkeyPatch, probes_of_tests: Path) -> None:
    """What is measured while other tests run is too low: no user's command may find it.

    A test that sets a cache of its own has its probes there.
    """
    usual, cache = probes.probes_file, os.environ.get("XDG_CACHE_HOME")

    def file() -> Path:
        return probes_of_tests if os.environ.get("XDG_CACHE_HOME") == cache else usual()

    monkeypatch.setattr(probes, "probes_file", file)


@pytest.fixture(autouse=True)
def tables_have_the_width_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its workers COLUMNS=80, where long names are broken over two lines."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def ruler_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples each of two tasks at 1,024 tokens, by the demo tokenizer."""
    folder = tmp_path_factory.mktemp("data") / "ruler"
    command = "build-data ruler --tokenizer demo --context-length 1k --num-samples 3"
    tasks = "niah_single_2,vt"
    assert run([*command.split(), "--tasks", tasks, "--output", str(folder)]) == 0
    return folder
