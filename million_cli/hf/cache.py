"""The caches that `model.generate(past_key_values=...)` takes."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.paged import PagedStore
from million_cli.hf.pq_cache import PQCache, Prefill
from million_cli.hf.rotary import served
from million_cli.hf.select import (
    COMPILED,
    Kernels,
    Request,
)
from million_cli.pq.codebook import Codebook
from million_cli.spec import WindowSpec


class DynamicPQCache(PQCache):
    """A KV cache of product codes in contiguous buffers that grow with the text, behind a residual window.

    Args:
        model: the model to serve; while this cache goes through it, it uses our attention function.  A
            configuration will do too; then only shapes are checked, and the model must have had
            `use_pq_attention(model)`.
        codebook: trained for the model, or the path of one.
        window: page size and residual window; the default is 64 and 128 tokens.
        prefill: what the tokens of one forward pass attend to: "exact" K and V of all tokens that were not
            coded before, or "quantized", the codes and window that each would see when decoded one by one.
        compute: "auto" takes a compiled kernel for decode steps on a GPU where there is one, and compiles it
            if it has to; "kernel" asks for it anywhere, "torch" is the reference.
        strict: raise a `UserError` instead of falling back.
        encoder: finds nearest centroids where no kernel does; one of `recipe.ENCODERS`.
        kernels: the compiled operations; by default the package's CUDA kernels.

    Raises:
        UserError: a codebook of another model, an unsupported architecture, an argument out of range, or a
            fallback of a strict cache.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        codebook: Codebook | str | os.PathLike[str],
        window: WindowSpec | None = None,
        *,
        prefill: Prefill = "exact",
        compute: Literal["auto", "kernel", "torch"] = "auto",
        strict: bool = False,
        encoder: str = "torch",
        kernels: Kernels = COMPILED,
    ) -> None:
        codebook = _served(codebook, model)
        layers = _layers_of(codebook)
        super().__init__(
            model,
            codebook,
            window,
            Request(ContiguousStore.name, compute, strict),
            {
                ContiguousStore.name: partial(
                    ContiguousStore, layers, window, prefill=prefill, encoder=encoder
                )
            },
            kernels,
        )


class PagedPQCache(PQCache):
    """A KV cache of product codes in pages of a pool behind a residual window; a block table finds them.

    It attends as `DynamicPQCache` does; beams share pages.  When the pool runs out in the middle of a text,
    the cache continues with a contiguous store and the same tokens; `fallbacks` records it.

    Args:
        max_pages: size of the pool, for all sequences together; None lets it grow.
        others: as for `DynamicPQCache`.

    Raises:
        UserError: as `DynamicPQCache`.
    """

    settings = ("max_pages",)

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        codebook: Codebook | str | os.PathLike[str],
        window: WindowSpec | None = None,
        *,
        max_pages: int | None = None,
        prefill: Prefill = "exact",
        compute: Literal["auto", "kernel", "torch"] = "auto",
        strict: bool = False,
        encoder: str = "torch",
        kernels: Kernels = COMPILED,
    ) -> None:
        codebook = _served(codebook, model)
        layers = _layers_of(codebook)
        super().__init__(
            model,
            codebook,
            window,
            Request(PagedStore.name, compute, strict),
            {
                PagedStore.name: partial(
                    PagedStore, layers, window, prefill=prefill, max_pages=max_pages, encoder=encoder
                ),
                ContiguousStore.name: partial(
                    ContiguousStore, layers, window, prefill=prefill, encoder=encoder
                ),
            },
            kernels,
        )


def _served(
    codebook: Codebook | str | os.PathLike[str], model: PreTrainedModel | PreTrainedConfig
) -> Codebook:
    """The codebook (loaded from a path if need be) for the model's scaling of positions."""
    codebook = codebook if isinstance(codebook, Codebook) else Codebook.load(codebook)
    return codebook if isinstance(model, PreTrainedConfig) else served(codebook, model)


def _layers_of(codebook: Codebook) -> list[Any]:
    return [(codebook.keys.layer(i), codebook.values.layer(i)) for i in range(codebook.num_layers)]
