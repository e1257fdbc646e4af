"""The models that a benchmark loads by name, and whether they fit into this machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from million_cli.bench.cases import Case
from million_cli.conf import conf_folder
from million_cli.errors import UserError
from million_cli.hf.models import load_config, load_model, random_model, resolve_dtype, shape_config


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet: from a path, or random weights in a shape.

    Attributes:
        name: for messages.
        dtype: as for `load_model`; of random weights auto is float16 on a GPU and float32 on a CPU.
        trust_remote_code: as for `load_model`.
        loaded: returns the model, if the caller loads it.
    """

    name: str
    path: str | None
    shape: Mapping[str, Any] | None
    device: torch.device
    dtype: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    loaded: Callable[[], PreTrainedModel] | None = None

    @classmethod
    def named(cls, name: str, device: torch.device, dtype: str, seed: int) -> Source:
        """A model by its name under conf/model, its folder, or its name on the hub."""
        path = conf_folder() / "model" / f"{name}.yaml"
        described: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {"path": name}
        trusted = bool(described.get("trust_remote_code", False))
        return cls(name, described.get("path") or name, described.get("shape"), device, dtype, seed, trusted)

    def load(self) -> PreTrainedModel:
        """The model.

        Raises:
            UserError: see `load_model` and `random_model`.
        """
        if self.loaded is not None:
            return self.loaded()
        if self.shape:
            dtype = self.dtype
            if dtype == "auto":
                dtype = "float32" if self.device.type == "cpu" else "float16"
            return random_model(dict(self.shape), self.seed, dtype, self.device)
        assert self.path
        return load_model(self.path, self.dtype, self.device, self.trust_remote_code)[0]

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration; reads no weights.

        Raises:
            UserError: there is no such model.
        """
        if self.shape:
            return shape_config(self.shape)
        assert self.path
        return load_config(self.path, self.trust_remote_code)

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the weights, and of dense K and V of `tokens` tokens."""
        dtype = resolve_dtype(self.dtype)
        if dtype is None:
            dtype = torch.float32 if self.shape else getattr(self.config, "dtype", None) or torch.float32
        return dtype.itemsize * (self._parameters + dense_elements(self.config, tokens))

    @cached_property
    def _parameters(self) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        return sum(parameter.numel() for parameter in model.parameters())


def dense_elements(config: PreTrainedConfig, tokens: int) -> int:
    """Elements of K and V of `tokens` tokens in all layers."""
    config = config.get_text_config(decoder=True)
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * D * tokens


def check_memory(case: Case, source: Source, new_tokens: int, free_bytes: int | None) -> None:
    """Refuse a case that a CPU's memory cannot hold: the system would end the process in the middle of it.

    Args:
        free_bytes: see `free_memory`; None refuses nothing.

    Raises:
        UserError: too little memory.
    """
    tokens = case.batch * (case.context + (case.new_tokens or new_tokens))
    needed = source.bytes_of(tokens)
    if free_bytes is not None and needed > free_bytes:
        raise UserError(
            f"bench.cases: model={source.name}, context={case.context}, batch={case.batch} needs "
            f"{needed / 1e9:.1f} GB of memory and there are {free_bytes / 1e9:.1f} GB; "
            "accepted are a smaller model, context or batch, or device=cuda"
        )


def free_memory() -> int | None:
    """Bytes that a process on this machine can still take, within its control group; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "MemAvailable" not in fields:
        return None
    free = 1024 * int(fields["MemAvailable"].split()[0])
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or no limit
        return free
