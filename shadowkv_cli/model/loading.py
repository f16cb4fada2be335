"""Load a Hugging Face decoder and what the program must know of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

from shadowkv_cli.catalogue.places import model_folder
from shadowkv_cli.catalogue.shapes import shape_named
from shadowkv_cli.config import MethodSpec, ModelShape, ShadowKVSpec
from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.model.exact_attention import check_installed
from shadowkv_cli.model.facts import model_facts
from shadowkv_cli.model.fused import Fused, join_projections
from shadowkv_cli.model.loading_errors import explained
from shadowkv_cli.model.rotary import attention_modules, head_dim, is_interleaved
from shadowkv_cli.model.suitability import probe_keys
from shadowkv_cli.model.weights_fit import check_weights_fit
from shadowkv_cli.ops import compiled
from shadowkv_cli.run_config import ModelChoice

SHAPE_SEED = 42
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with the facts that runs are checked against.

    Attributes:
        odd_layers: whose keys are not plainly rotated, see `suitability.probe_keys`.
        fused: ops in place of its small kernels, where the compiled ones serve its device.
    """

    model: PreTrainedModel
    name: str
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    eos_ids: frozenset[int]
    max_positions: int
    vocab_size: int
    interleaved: bool
    odd_layers: tuple[int, ...]
    fingerprint: str
    random_weights: bool
    fused: Fused | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def dtype_name(self) -> str:
        """Like `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def check(self, specs: list[MethodSpec], total_tokens: int) -> None:
        """Raise UsageError where a method or a length is impossible for the model."""
        for spec in specs:
            spec.check_model(self.shape, self.dtype_name)
        if self.odd_layers and any(isinstance(spec, ShadowKVSpec) for spec in specs):
            raise UsageError(
                f"shadowkv rebuilds keys by rotating them, but {len(self.odd_layers)} of "
                f"{self.shape.num_layers} layers of {self.name} have keys without a rotation, or "
                f"with a norm behind it (the first is layer {self.odd_layers[0]}): leave it out."
            )
        if total_tokens > self.max_positions:
            raise UsageError(
                f"The context of {total_tokens} tokens does not fit {self.name}, which has "
                f"max_position_embeddings {self.max_positions}: use a shorter --context-length."
            )


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device. Raises UsageError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"'{name}' is no device: use cpu, cuda, cuda:N or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"'{name}' is no device this tool runs on: use cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"There is no {name} here: `shadowkv doctor` lists what is.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto` into bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def _from_pretrained(choice: ModelChoice, dtype: torch.dtype) -> PreTrainedModel:
    """Load from the hub or a folder; every known way to fail becomes one line."""
    ours = model_folder(choice.name, offline=choice.offline)
    if ours is not None:
        choice = dataclasses.replace(choice, name=str(ours), revision=None)
    trust = choice.trust_remote_code
    with explained(choice) as local:
        answer: Any = AutoModelForCausalLM.from_pretrained(
            choice.name,
            dtype=dtype,
            revision=choice.revision or "main",
            trust_remote_code=trust,
            local_files_only=local,
            # Anything but safetensors is unpickled, which runs code.
            use_safetensors=None if trust else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
        )
    model: PreTrainedModel
    model, report = answer
    _check_weights(choice.name, report)
    return model


def _check_weights(name: str, report: Mapping[str, Any]) -> None:
    """Raise ShadowKVError where the files lack weights, which would be random numbers then."""
    for what, keys in (
        ("does not hold", report["missing_keys"]),
        ("holds in another shape than its config.json says", report["mismatched_keys"]),
    ):
        if keys:
            first = min(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ShadowKVError(
                f"Cannot use the model {name}: it {what} the weights {first}{more}; they would be "
                "random. Its config.json or class does not belong to its weights."
            )


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        ids = model.config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _fingerprint(model: PreTrainedModel) -> str:
    """Tell other weights or another configuration apart: a hash of both, the weights sampled."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    for volatile in ("transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{list(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def describe(model: PreTrainedModel, name: str, *, random_weights: bool = False) -> LoadedModel:
    """Gather what the program must know of a model that is in memory.

    Raises UsageError for an architecture that methods can't serve.
    """
    model = model.eval()
    attention = attention_modules(model)
    config = model.config.get_text_config()
    dtype = next(model.parameters()).dtype
    shape = ModelShape(
        num_layers=len(attention),
        num_q_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim(model),
        element_bytes=dtype.itemsize,
    )
    interleaved = is_interleaved(model)
    return LoadedModel(
        model=model,
        name=name,
        shape=shape,
        dtype=dtype,
        device=next(model.parameters()).device,
        eos_ids=_eos_ids(model),
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        interleaved=interleaved,
        odd_layers=probe_keys(model, interleaved),
        fingerprint=_fingerprint(model),
        random_weights=random_weights,
        fused=Fused(model, interleaved) if has_kernels(model.device) else None,
    )


def load_model(choice: ModelChoice) -> LoadedModel:
    """Load a model that needs no hub, a folder or a hub model.

    Raises:
        UsageError: an unknown device or model, an architecture that methods can't serve, or weights
            that do not fit.
        ShadowKVError: gated, unreachable or broken.
    """
    name = choice.name
    where = resolve_device(choice.device)
    precision = resolve_dtype(choice.dtype, where)
    check_installed(choice.backend, where)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not choice.trust_remote_code:  # what its own code would hold is not known
        check_weights_fit(model_facts(choice, precision), where)
    model: Any
    shape = shape_named(name)
    if shape is not None:
        model = _with_random_weights(shape, precision, where)
    else:
        model = _from_pretrained(choice, precision)
        model.to(where)
    if has_kernels(where):
        join_projections(model)
    return describe(model, name, random_weights=shape is not None)


def _with_random_weights(
    shape: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model of that configuration, its weights drawn on the device with a fixed seed."""
    config = AutoConfig.for_model(**shape)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(SHAPE_SEED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def has_kernels(device: torch.device) -> bool:
    """Whether the compiled ops serve a device."""
    return device.type == "cuda" and not compiled.ABSENT
