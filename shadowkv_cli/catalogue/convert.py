"""SmolLM2 from GGUF to a folder that transformers loads at once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowkv_cli.errors import ShadowKVError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_DIR = Path(__file__).resolve().parent / "smollm2"
WEIGHTS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
"""Of all weights in float32, in the order of their names."""


def convert(gguf: Path, target: Path) -> None:
    """Write weights (float32, as de-quantised), configuration and tokenizer into a folder.

    Raises ShadowKVError where the weights are not those that the project was measured with.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers import logging as transformers_logging
    from transformers.utils import logging as bars

    transformers_logging.set_verbosity_error()
    bars.disable_progress_bar()
    config = AutoConfig.from_pretrained(CONFIG_DIR)
    with torch.device("meta"):  # nothing is drawn that weights would replace
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(_weights(model, gguf), strict=False, assign=True)
    model.tie_weights()
    _check_weights(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, config=config, local_files_only=True
    )
    _split_digits(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _weights(model: Any, gguf: Path) -> dict[str, Tensor]:
    """De-quantise the weights of a Llama from a GGUF file: float32, by their names in transformers.

    transformers would read the file once more, and look all names up again for each module.
    """
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    config, weights = model.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for name, _ in model.named_parameters():
        tensor = stored[names.get_name(name, (".weight",)) or name]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if (rotated := heads.get(name.split(".")[-2])) is not None:
            # llama.cpp rotates neighbouring dimensions, transformers halves of a head.
            weight = weight.unflatten(0, (rotated, -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = weight
    return weights


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
