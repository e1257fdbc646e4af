"""Product quantization of the KV cache of transformers models.

Train a codebook for a model on some text, then generate with a cache of codes:

    from million_cli import PagedPQCache, load_model, train_codebook

    model, tokenizer = load_model("reference")
    codebook = train_codebook(model, tokenizer, open("calibration.txt").read(), recipe="pq-4bit")
    codebook.save("codebook.safetensors")

    cache = PagedPQCache(model, "codebook.safetensors")
    inputs = tokenizer("The history of the", return_tensors="pt")
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=200)
    print(tokenizer.decode(output[0]), cache.memory())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from million_cli._version import __version__ as __version__

if TYPE_CHECKING:
    from million_cli.calibration.calibrate import train_codebook
    from million_cli.engine.dense import DenseCache
    from million_cli.engine.engine import Engine
    from million_cli.hf.cache import DynamicPQCache, PagedPQCache
    from million_cli.hf.models import load_model
    from million_cli.hf.static import StaticPQCache
    from million_cli.recipe import Recipe

__all__ = [
    "DenseCache",
    "DynamicPQCache",
    "Engine",
    "PagedPQCache",
    "Recipe",
    "StaticPQCache",
    "load_model",
    "train_codebook",
]

_HOME = {
    "DenseCache": "million_cli.engine.dense",
    "Engine": "million_cli.engine.engine",
    "StaticPQCache": "million_cli.hf.static",
    "DynamicPQCache": "million_cli.hf.cache",
    "PagedPQCache": "million_cli.hf.cache",
    "Recipe": "million_cli.recipe",
    "load_model": "million_cli.hf.models",
    "train_codebook": "million_cli.calibration.calibrate",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts without torch."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
