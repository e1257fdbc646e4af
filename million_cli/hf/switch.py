"""Which attention function a model uses, and when: ours while a PQ cache goes through it, else its own.

transformers looks the function up in the model's configuration at each forward pass.  Hooks on the model (and
on its decoder, which calibration calls alone) put ours there when a forward pass is given a cache that
needs it, and put back what was there when the pass ends.  Between passes the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError

# No "flash", "paged|" or "/" in it: transformers gives those a meaning.
ATTENTION_NAME = "million_pq"
_DECODER, _MODEL, _CALLER = 1, 2, 3  # who switched: whoever is further out also switches back
_KEY = "_million_switch"


class AttentionSwitch:
    """The configurations of one model, and their attention functions before a forward pass.

    A model runs one forward pass at a time: threads that share a model take turns.
    """

    def __init__(self, configs: list[PreTrainedConfig]) -> None:
        self.configs = configs
        self._owner = 0
        self._before: list[Any] = []

    def enter(self, who: int, needed: bool) -> None:
        """A forward pass of `who` begins; `needed` if its cache needs our function."""
        if self._owner and self._owner <= who:  # cut short before its end, by Ctrl-C for example
            self.leave(self._owner)
        if needed and not self._owner:
            self._before = [config._attn_implementation_internal for config in self.configs]
            for config in self.configs:
                config._attn_implementation_internal = ATTENTION_NAME
            self._owner = who

    def leave(self, who: int) -> None:
        """The pass of `who` is over."""
        if self._owner == who:
            for config, name in zip(self.configs, self._before, strict=True):
                config._attn_implementation_internal = name
            self._owner = 0


def use_pq_attention(model: PreTrainedModel) -> AttentionSwitch:
    """Let `model` serve PQ caches; with any other cache, and without one, it stays as it is.

    Caches made from a model do this themselves.

    Raises:
        UserError: the model's code does not go through transformers' attention interface.
    """
    known: AttentionSwitch | None = model.__dict__.get(_KEY)
    if known is not None:
        return known
    switch = AttentionSwitch(_switchable_configs(model))
    decoder = model.get_decoder()
    _hook(model, switch, _before_model, _after_model)
    if decoder is not model:
        _hook(decoder, switch, _before_decoder, _after_decoder)
    return switch


@contextmanager
def pq_attention(model: PreTrainedModel) -> Iterator[None]:
    """Our attention function for all forward passes inside, for code that calls a compiled forward itself."""
    switch = use_pq_attention(model)
    switch.enter(_CALLER, True)
    try:
        yield
    finally:
        switch.leave(_CALLER)


def _switchable_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that `set_attn_implementation` changes, with their old values restored."""
    configs = {
        id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)
    }
    for config in (model.config, model.config.get_text_config(decoder=True)):
        configs[id(config)] = config
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        reached = [c for c in configs.values() if c._attn_implementation_internal == ATTENTION_NAME]
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
    if not any(config is model.config.get_text_config(decoder=True) for config in reached):
        raise UserError(
            f"model_type={model.config.model_type}: its attention cannot be replaced; accepted are models "
            "that use transformers' attention interface"
        )
    return reached


def _hook(module: nn.Module, switch: AttentionSwitch, before: Any, after: Any) -> None:
    module.__dict__[_KEY] = switch
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


# Functions of the module, not closures: a model with hooks is copied and pickled as any other.
def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(module, _KEY).enter(_MODEL, _needs_us(args, kwargs))


def _after_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    getattr(module, _KEY).leave(_MODEL)


def _before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(module, _KEY).enter(_DECODER, _needs_us(args, kwargs))


def _after_decoder(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    getattr(module, _KEY).leave(_DECODER)


def _needs_us(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)]
    return any(getattr(cache, "needs_pq_attention", False) for cache in caches)
