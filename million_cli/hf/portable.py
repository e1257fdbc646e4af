"""Copies of PQ caches: in memory, by pickle, and in files."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, Self

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.cache.page_manager import PagePoolExhausted
from million_cli.cache.store import CodeStore
from million_cli.errors import UserError
from million_cli.hf.rotary import served
from million_cli.hf.saved import SavedCache, write_cache
from million_cli.hf.select import Choice, Kernels
from million_cli.ops.support import Store
from million_cli.pq.codebook import Codebook


class PortableCache(Cache):
    """A PQ cache that can be copied, pickled, saved and loaded; its state is that of `PQCache`."""

    codebook: Codebook
    store: CodeStore
    _kernels: Kernels
    _choice: Choice
    _make_store: dict[Store, Callable[..., CodeStore]]

    def _without_pages(self, reason: str) -> CodeStore:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the text; the codebook and the kernels are shared."""
        pairs = [pair for make in self._make_store.values() for pair in make.args[0]]  # type: ignore[attr-defined]
        held = [pq for state in self.store.quantizers for pq in state]
        for constant in (self.codebook, self._kernels, *held, *(pq for pair in pairs for pq in pair)):
            memo[id(constant)] = constant
        other = memo[id(self)] = self.__class__.__new__(self.__class__)
        other.__setstate__(deepcopy(self.__getstate__(), memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        store = copy(self.store)
        store.ops = None  # operations keep what belongs to one cache
        return {**self.__dict__, "store": store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._choice.compute == "kernel":
            self.store.ops = self._kernels.make_ops(self._choice.store)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the text to a file for `load`: codes, window and transformers' own layers, not the codebook.

        Raises:
            UserError: the cache holds no text, or the file cannot be written.
        """
        write_cache(path, self, self.store, self.codebook)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        codebook: Codebook | str | os.PathLike[str],
        **options: Any,
    ) -> Self:
        """A cache that holds the text of a file.  Every kind of cache reads the files of every other.

        Args:
            path: a file that `save` wrote.
            model: the model that read the text, in the same dtype.
            codebook: the codebook that coded it, or its path.
            options: arguments of the class, except `window`, which the file holds.

        Raises:
            UserError: as the class; no such file, one that is damaged, or another codebook or dtype.
        """
        codebook = codebook if isinstance(codebook, Codebook) else Codebook.load(codebook)
        saved = SavedCache(path, served(codebook, model))
        if saved.dtype != model.dtype:
            raise UserError(
                f"{path} holds {saved.dtype}, the model is of {model.dtype}; accepted is the same dtype"
            )
        make: Any = cls  # subclasses take these arguments
        cache: Self = make(model, codebook, saved.window, **options)
        try:
            saved.fill(cache, cache.store, model.device)
        except PagePoolExhausted as error:
            cache._without_pages(str(error)).reset()
            saved.fill(cache, cache.store, model.device)
        for index in codebook.meta.fingerprint.layers:
            layer: Any = cache.layers[index]
            layer.is_initialized = True
        return cache
