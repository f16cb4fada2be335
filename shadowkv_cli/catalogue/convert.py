"""SmolLM2 from GGUF to a folder that transformers loads at once."""

from __future__ import annotations

import hashlib
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from shadowkv_cli.errors import ShadowKVError

WEIGHTS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
"""Of all weights in float32, in the order of their names."""


def convert(gguf: Path, target: Path) -> None:
    """Write weights (float32, as de-quantised), configuration and tokenizer into a folder.

    Raises ShadowKVError where the weights are not those that the project was measured with.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers import logging as transformers_logging
    from transformers.utils import logging as bars

    transformers_logging.set_verbosity_error()
    bars.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    _split_digits(tokenizer)
    with redirect_stderr(io.StringIO()):  # a bar of its own that nothing else turns off
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **source
        )
    _check_weights(model)
    # They are no longer quantised, and transformers refuses to save a model that says it is.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = "smollm2"
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(target)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _split_digits(tokenizer: Any) -> None:
    """Split digits one by one, as the GGUF says (`tokenizer.ggml.pre = smollm`).

    transformers leaves that out, and two spaces before a number come out differently.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _check_weights(model: Any) -> None:
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    if digest.hexdigest() != WEIGHTS_SHA256:
        raise ShadowKVError(
            "The conversion of smollm2 gave other weights than those the project was measured "
            f"with (sha256 {digest.hexdigest()}): the versions of transformers and gguf differ too "
            "much; install those of constraints.txt."
        )
