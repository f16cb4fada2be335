"""Train the bundled model, resume, evaluate and export: see `--help`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

DEFAULT_SEED = 20261124
MINUTES, CONTINUED_MINUTES = 13.6, 4.2
CONTINUED_RATE = 0.5
"""Share of the learning rates with which trained weights are trained on; they fall at once."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shadowkv_cli.train_demo",
        description="Train the bundled demo model on RULER's tasks; one GPU, about 20 minutes.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all results")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        help=f"training time in all ({MINUTES}; {CONTINUED_MINUTES} with --continue-from)",
    )
    length.add_argument("--steps", type=int, help="training steps in all, instead of --minutes")
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="DIR",
        help="folder of trained weights, which are trained on in long rows",
    )
    parser.add_argument("--pause-minutes", type=float, help="stop this call after so long")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--held-out", type=Path, help="dataset folder to score at the end")
    parser.add_argument("--limit", type=int, help="samples per task and length of --held-out")
    return parser.parse_args()


def main() -> None:
    """Parse, train, export, evaluate."""
    arguments = _arguments()
    import torch
    from transformers import LlamaForCausalLM

    from shadowkv_cli.console import notice
    from shadowkv_cli.model.demo import demo_config
    from shadowkv_cli.tasks.rows import Dataset
    from shadowkv_cli.tasks.tokenization import load_tokenizer
    from shadowkv_cli.train_demo.curriculum import CONTINUED, STAGES
    from shadowkv_cli.train_demo.export import export_model, rounded
    from shadowkv_cli.train_demo.heldout import held_out_scores
    from shadowkv_cli.train_demo.network import Network, new_model
    from shadowkv_cli.train_demo.trainer import CHECKPOINT, DECAY_FROM, Settings, Trainer

    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / CHECKPOINT
    if checkpoint.exists() != arguments.resume:
        raise SystemExit(
            f"{checkpoint} is there: add --resume or name another folder."
            if checkpoint.exists()
            else f"There is no {checkpoint} to resume from."
        )
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer("demo")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    continued: Path | None = arguments.continue_from
    model: Any
    if continued:
        model = LlamaForCausalLM.from_pretrained(
            continued, dtype=torch.float32, local_files_only=True
        )
    else:
        model = new_model(demo_config(len(tokenizer), *special), arguments.seed)
    model.to(device)
    minutes = arguments.minutes or (CONTINUED_MINUTES if continued else MINUTES)
    trainer = Trainer(
        model,
        CONTINUED if continued else STAGES,
        Settings(
            seed=arguments.seed,
            output=output,
            seconds=None if arguments.steps is not None else 60 * minutes,
            steps=arguments.steps,
            pause=None if arguments.pause_minutes is None else 60 * arguments.pause_minutes,
            workers=arguments.workers,
            rate=CONTINUED_RATE if continued else 1.0,
            decay_from=0.0 if continued else DECAY_FROM,
        ),
    )
    if arguments.resume:
        trainer.load(checkpoint)
    started = time.perf_counter()
    done = trainer.run()
    notice(f"Trained for {time.perf_counter() - started:.0f} s, {trainer.progress.step} steps.")
    if not done:
        return
    export_model(model, output)
    if arguments.held_out is not None:
        network = Network(rounded(model), dtype=trainer.network.dtype, compiled=False)
        scores = held_out_scores(
            network, tokenizer, Dataset.open(arguments.held_out), arguments.limit, notice
        )
        (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
