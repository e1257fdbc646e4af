"""Models and tokenizers by name, and the fingerprint that ties a codebook to a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from million_cli.errors import UserError, first_line
from million_cli.hf.gguf import SMOLLM2, converted, is_gguf, smollm2
from million_cli.hf.incomplete import refuse_incomplete
from million_cli.hf.own_layers import ACCEPTED
from million_cli.hf.probe import sign_bits
from million_cli.spec import ModelFingerprint

REFERENCE_MODEL = "reference"
REFERENCE_FOLDER = Path(__file__).parent.parent / "assets" / "reference-model"
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ACCEPTED = f"a folder, a GGUF file, a hub name, {REFERENCE_MODEL} or {SMOLLM2}"
# The last ones are fused with the queries: Phi-3; GPT-2, BigCode; GPT-NeoX, Persimmon; DBRX.
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv")


def load_model(
    name_or_path: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name_or_path: a local folder, a GGUF file, a name on the hub, `reference`, the small model shipped
            with the package, or `smollm2` (see `hf.gguf.smollm2`).
        dtype: one of `DTYPES`, or "auto" for the checkpoint's own.
        device: where the weights go, e.g. "cpu" or "cuda:0".
        trust_remote_code: run Python code that comes with the checkpoint. Nobody is asked.

    Returns:
        The model and its tokenizer; a tokenizer without a padding token pads with its end-of-text token.

    Raises:
        UserError: no such model, a damaged checkpoint, one whose weights are not the model's (see
            `hf.incomplete`), one that needs its own code without `trust_remote_code`, or an unknown
            dtype or device.
    """
    torch_dtype = resolve_dtype(dtype)
    torch_device = resolve_device(device)
    source = _resolve_name(name_or_path)
    loaded: Any  # transformers' annotations say a model
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if torch_dtype is None else torch_dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # each layer below raises types of its own: OSError, SafetensorError, KeyError, ...
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"model={name_or_path}: needs Python code that comes with it; model.trust_remote_code=true "
                "runs that code (read it first)"
            ) from error
        raise UserError(f"model={name_or_path}: cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    refuse_incomplete(name_or_path, loaded[1])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(torch_device)  # type: ignore[arg-type]  # transformers' wrapper of `to` hides its signature
    return model.eval(), tokenizer


def load_config(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, without its weights; arguments as for `load_model`.

    Raises:
        UserError: no such model, or a damaged configuration.
    """
    source = _resolve_name(name_or_path)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, KeyError, ...
        raise UserError(f"model={name_or_path}: cannot be loaded: {first_line(error)}") from error


def shape_config(shape: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a shape: fields of a transformers configuration with `model_type`.

    Raises:
        UserError: an unknown model_type or field.
    """
    try:
        return AutoConfig.for_model(**shape)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"model_type={shape.get('model_type')}: {first_line(error)}") from error


def random_model(
    config: PreTrainedConfig | dict[str, Any],
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A model of the given shape with random weights, for speed measurements and tests; no download.

    Args:
        config: a transformers configuration, or its fields including `model_type`.

    Raises:
        UserError: an unknown model_type, dtype or device.
    """
    torch_dtype = resolve_dtype(dtype)
    if isinstance(config, dict):
        config = shape_config(config)
    torch_device = resolve_device(device)
    with torch.random.fork_rng(devices=[torch_device] if torch_device.type == "cuda" else []), torch_device:
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch_dtype).eval()
        except (ValueError, ImportError) as error:  # no causal language model, or one that needs a package
            raise UserError(f"model_type={config.model_type}: {first_line(error)}") from error


def full_attention_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers whose K and V grow with the text, which product quantization serves.

    Raises:
        UserError: an architecture without such layers, or with layers that do not keep K and V per head.
    """
    text_config = config.get_text_config(decoder=True)
    name = text_config.model_type
    if config.is_encoder_decoder or getattr(text_config, "cross_attention_layers", None):
        raise UserError(
            f"model_type={name}: cross attention is not supported; accepted are decoder-only models"
        )
    if getattr(text_config, "kv_lora_rank", None) is not None:
        raise UserError(
            f"model_type={name}: latent attention (MLA) is not supported; accepted is per-head K and V"
        )
    full = []
    for index, layer in enumerate(DynamicCache(config=text_config).layers):
        if type(layer) is DynamicLayer or _sees_all(layer, text_config):
            full.append(index)
        elif type(layer) not in ACCEPTED and type(layer).__name__ != "DummyLayer":
            raise UserError(
                f"model_type={name}: layer {index} keeps a {type(layer).__name__}; "
                "accepted are full, sliding-window and linear attention, one a layer"
            )
    if not full:
        raise UserError(f"model_type={name}: no layer has full attention, so there is nothing to quantise")
    return tuple(full)


def _sees_all(layer: Any, text_config: PreTrainedConfig) -> bool:
    """Whether a sliding window is as long as any text: Phi-3-mini-128k, Phi-4-mini."""
    trained = getattr(text_config, "max_position_embeddings", None)
    return (
        type(layer) is DynamicSlidingWindowLayer and trained is not None and layer.sliding_window >= trained
    )


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a layer that counts as one of full attention would slide, or None."""
    text_config = config.get_text_config(decoder=True)
    layers = DynamicCache(config=text_config).layers
    windows = [
        layer.sliding_window
        for layer in layers
        if isinstance(layer, DynamicSlidingWindowLayer) and _sees_all(layer, text_config)
    ]
    return min(windows, default=None)


def fingerprint(model: PreTrainedModel) -> ModelFingerprint:
    """Identify a model for its codebooks.

    `weights` is a digest of the key and value projections of the full-attention layers: the signs of 4096
    elements of the matrix that each applies, adapters and dequantisation included (see `hf.probe`).  A
    codebook trained on a float32 copy fits the float16 one, while retrained or other weights differ; an 8B
    model costs milliseconds.  `rope_theta` is the base of the rotary embedding: another one turns keys at
    other speeds.  Scalings of positions (YaRN, ...) are left out, since codebooks hold for all positions.

    Raises:
        UserError: an unsupported architecture (see `full_attention_layers`), or weights that are not in
            memory.
    """
    layers = full_attention_layers(model.config)
    attention = dict(attention_modules(model))
    digest = hashlib.sha256()
    shapes = set()
    for index in layers:
        if index not in attention:
            raise UserError(
                f"model_type={model.config.model_type} cannot be served: layer {index} makes keys and values "
                f"in an unknown way; accepted are k_proj and v_proj, or {', '.join(_PROJECTIONS[2:])}"
            )
        module = attention[index]
        shapes.add(_kv_shape(module, model.config.get_text_config(decoder=True)))
        for projection in _kv_projections(module):
            if any(parameter.device.type == "meta" for parameter in projection.parameters()):
                raise UserError(f"layer {index}: its weights are offloaded; load the model on one device")
            digest.update(sign_bits(projection, model.dtype))
    if len(shapes) != 1:
        raise UserError(
            f"model_type={model.config.model_type}: (KV heads, head_dim) differ among full-attention layers: "
            f"{sorted(shapes)}; accepted is one shape"
        )
    ((num_kv_heads, head_dim),) = shapes
    text_config = model.config.get_text_config(decoder=True)
    return ModelFingerprint(
        model_type=text_config.model_type,
        num_layers=text_config.num_hidden_layers,
        layers=layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        weights=digest.hexdigest()[:32],
        rope_theta=_rope_theta(text_config),
    )


def _rope_theta(config: PreTrainedConfig) -> float | None:
    """The base of the rotary embedding of full-attention layers; None without one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention") or parameters
    theta = parameters.get("rope_theta")
    return None if theta is None else float(theta)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype of a name in `DTYPES`; None for "auto".

    Raises:
        UserError: any other name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: accepted are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device that this machine has.

    Raises:
        UserError: a device that does not exist here.
    """
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device}: accepted are cpu, cuda, cuda:<number>") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return resolved


def _resolve_name(name_or_path: str) -> str:
    """A folder or a hub name.  A name that looks like a path must exist: no typing error reaches the hub."""
    if not name_or_path:
        raise UserError(f"model={name_or_path}: accepted are {_ACCEPTED}")
    if name_or_path == REFERENCE_MODEL:
        if not REFERENCE_FOLDER.is_dir():
            raise UserError(f"model={name_or_path}: {REFERENCE_FOLDER} is missing; reinstall the package")
        return str(REFERENCE_FOLDER)
    if name_or_path == SMOLLM2:
        return str(smollm2())
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model={name_or_path}: the folder holds no config.json")
        return str(folder)
    if folder.is_file():
        if not is_gguf(folder):
            raise UserError(f"model={name_or_path}: not a GGUF file; accepted are {_ACCEPTED}")
        return str(converted(folder))
    looks_like_path = (
        folder.is_absolute()
        or name_or_path.startswith((".", "~"))
        or name_or_path.endswith((os.sep, ".gguf"))
    )
    if looks_like_path or name_or_path.count("/") > 1:
        raise UserError(f"model={name_or_path}: no such folder or file; accepted are {_ACCEPTED}")
    return name_or_path


def attention_modules(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module]]:
    """The modules that make keys and values, with their layer's index."""
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and _kv_projections(module):
            yield index, module


def has_sinks(model: PreTrainedModel) -> bool:
    """Whether full-attention layers have sinks, a logit a head in the softmax's denominator (gpt_oss)."""
    modules = dict(attention_modules(model))
    layers = full_attention_layers(model.config)
    return any(getattr(modules.get(index), "sinks", None) is not None for index in layers)


def _kv_projections(module: nn.Module) -> list[Any]:
    """The linear maps to K and V: two of them, or one that is fused with the queries'."""
    projections = [getattr(module, name, None) for name in _PROJECTIONS]
    return [p for p in projections if isinstance(p, nn.Module) and hasattr(p, "weight")]


def _kv_shape(module: nn.Module, config: PreTrainedConfig) -> tuple[int, int]:
    """(Hkv, D) of an attention module.

    Raises:
        UserError: D of keys and of values differ.
    """
    head_dim = int(getattr(module, "head_dim", config.hidden_size // config.num_attention_heads))
    k_proj = getattr(module, "k_proj", None)
    if k_proj is None:
        for owner, name in (
            (module, "num_key_value_heads"),
            (module, "kv_heads"),
            (config, "num_key_value_heads"),
        ):
            if isinstance(heads := getattr(owner, name, None), int):
                return heads, head_dim
        return config.num_attention_heads, head_dim
    Hkv, v_proj = k_proj.out_features // head_dim, getattr(module, "v_proj", None)
    if v_proj is not None and v_proj.out_features != k_proj.out_features:
        raise UserError(
            f"model_type={config.model_type}: head_dim of keys and values differ ({head_dim} and "
            f"{v_proj.out_features // Hkv}); accepted is one for both"
        )
    return Hkv, head_dim
