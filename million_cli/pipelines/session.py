"""The shared state of a job's stages: its model, loaded once, and its texts."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from million_cli.errors import UserError
from million_cli.hf.fold import FoldedValues
from million_cli.hf.models import fingerprint, load_model, random_model, resolve_device
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig
from million_cli.pq import Codebook
from million_cli.spec import ModelFingerprint
from million_cli.text import Text, TextConfig, load_text

logger = logging.getLogger("million")
_ORIGIN = ("transformers_version", "name_or_path")


class Session:
    """A job's configuration with everything that is loaded from it, each when first asked for."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self._texts: dict[str, Text] = {}
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    @cached_property
    def device(self) -> torch.device:
        """`config.device`; auto is the GPU if there is one.

        Raises:
            UserError: no such device here.
        """
        name = self.config.device
        if name == "auto":
            name = "cuda:0" if torch.cuda.is_available() else "cpu"
        return resolve_device(name)

    @cached_property
    def dtype(self) -> str:
        """`config.model.dtype`; auto is float32 on a CPU, else the checkpoint's (random weights: float16)."""
        config = self.config.model
        if config.dtype != "auto":
            return config.dtype
        if self.device.type == "cpu":
            return "float32"
        return "float16" if config.shape else "auto"

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Any]:
        config = self.config.model
        logger.info("model %s on %s", config.path or config.name, self.device_name)
        if not config.shape:
            assert config.path
            return load_model(config.path, self.dtype, self.device, config.trust_remote_code)
        model = random_model(config.shape, self.config.seed, self.dtype, self.device)
        if config.path:
            raise UserError(f"model.path={config.path}: a model has a path or a shape, not both")
        return model, byte_tokenizer()

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        return fingerprint(self.model)

    @property
    def device_name(self) -> str:
        """For the record: the GPU's name, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def text(self, config: TextConfig) -> Text:
        """The text a configuration names, read once."""
        key = repr((config.dataset, config.split, config.path, config.max_chars, config.seed))
        if key not in self._texts:
            self._texts[key] = load_text(config)
        return self._texts[key]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model in a stage's key: all that a figure may depend on.

        Its fingerprint, weights, configuration (of generation too), tokenizer, dtype and device.
        """
        generation = self.model.generation_config
        return {
            "config": _settings(self.model.config.to_dict()),
            "generation": None if generation is None else _settings(generation.to_dict()),
            "tokenizer": _tokenizer_digest(self.tokenizer),
            "fingerprint": self.fingerprint.to_dict(),
            "weights": _weights_digest(self.model),
            "dtype": str(self.model.dtype),
            "device": self.device_name,
        }

    def fold(self, codebook: Codebook) -> Codebook:
        """The codebook for the model with its values' maps folded in, which it stays from here on.

        Its identity remains that of the weights that were loaded.

        Raises:
            UserError: as `hf.fold.FoldedValues`.
        """
        _ = self.identity, self.fingerprint  # before the weights change
        return FoldedValues(self.model, codebook).codebook

    def result(self, metrics: dict[str, Any], fallbacks: list[str] | None = None) -> Result:
        """A result with the session's configuration, device and dtype."""
        return Result(
            config=asdict(self.config),
            metrics=metrics,
            fallbacks=fallbacks or [],
            device=self.device_name,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens 0..255 and two special tokens, for models with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where it came from, or how attention is computed here."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _ORIGIN}


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what text becomes under a tokenizer: its rules, tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        rules |= {"padding": None, "truncation": None}  # set by each call
    parts = [rules, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _weights_digest(model: PreTrainedModel) -> str:
    """Digest of up to 256 evenly spaced elements of every parameter: milliseconds even for large models."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32)
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]
