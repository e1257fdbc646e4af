"""Caches in files: a prompt that is read once serves many processes.

One safetensors file: for each full-attention layer the bit-packed rows of key and value codes and the exact
window; for each layer of transformers' own its tensors; a card as JSON.  It holds the hash of the codebook,
not the codebook.

Letters: B batch, Hkv KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from million_cli.cache.store import CodeStore
from million_cli.errors import UserError, first_line
from million_cli.files import read_safetensors, write_safetensors
from million_cli.hf.own_layers import is_linear, restore_layer, tensors_of
from million_cli.ops.layouts import RowLayout
from million_cli.pq.codebook import Codebook, content_hash
from million_cli.spec import WindowSpec

FORMAT = "million-cache"
VERSION = 2  # 2: states of linear attention, a hash of card and tensors


def write_cache(path: str | os.PathLike[str], cache: Cache, store: CodeStore, codebook: Codebook) -> None:
    """Write the contents of a cache, atomically.

    Raises:
        UserError: the cache holds no text, or is in the middle of a forward pass.
    """
    lengths = {store.length(layer) for layer in range(store.num_layers)}
    if len(lengths) != 1 or not store.length():
        raise UserError(
            f"a cache with {sorted(lengths)} tokens in its layers: accepted is one that holds a text"
        )
    tensors: dict[str, Tensor] = {}
    for layer, spec in enumerate(store.specs):
        coded = store.coded(layer)
        for side, codes, exact in zip(
            ("keys", "values"), store.codes(layer), store.exact(layer), strict=True
        ):
            rows = RowLayout(getattr(spec, side), store.window.page_size)
            tensors[f"{layer}.{side}.codes"] = rows.pack(codes.read(0, coded))
            tensors[f"{layer}.{side}.exact"] = exact
    own = {}
    for index, layer in _own(cache):
        if held := tensors_of(layer):
            tensors.update({f"own.{index}.{name}": tensor for name, tensor in held.items()})
            own[index] = list(held)
    card = {
        "version": VERSION,
        "window": asdict(store.window),
        "length": store.length(),
        "fingerprint": codebook.meta.fingerprint.to_dict(),
        "codebook": _digest(codebook),
        "own": own,
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"cache {path}: {name} holds NaN or infinity; it is not written")
    text = json.dumps(card, sort_keys=True)
    metadata = {"format": FORMAT, "card": text, "sha256": content_hash(text, tensors)}
    write_safetensors(path, tensors, metadata)


class SavedCache:
    """A file of `write_cache`, in memory.

    Attributes:
        window: page size and residual window of the cache.
        dtype: dtype of its exact vectors.

    Raises:
        UserError: no such file, another kind of file or version, or one written with another codebook.
    """

    def __init__(self, path: str | os.PathLike[str], codebook: Codebook) -> None:
        self._tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} is not a cache: format={metadata.get('format')!r}, accepted is {FORMAT!r}"
            )
        try:
            card = json.loads(metadata["card"])
            if card["version"] != VERSION:
                raise UserError(f"{path} has format version {card['version']}; accepted is {VERSION}")
            if metadata["sha256"] != content_hash(metadata["card"], self._tensors):
                raise UserError(f"{path} is damaged: its content has another hash than when it was saved")
            if card["codebook"] != _digest(codebook):
                raise UserError(
                    f"{path} was written with another codebook; its codes mean nothing in this one"
                )
            self.window, self._length = WindowSpec(**card["window"]), int(card["length"])
            self._own = {int(index): [str(name) for name in names] for index, names in card["own"].items()}
            self.dtype = self._tensors["0.keys.exact"].dtype
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__}: {first_line(error)}") from error

    def fill(self, cache: Cache, store: CodeStore, device: torch.device) -> None:
        """Put the text into an empty cache and its store.

        Raises:
            PagePoolExhausted: (paged) there are too few pages.
        """
        for layer, spec in enumerate(store.specs):
            codes, exact = [], []
            for side in ("keys", "values"):
                rows = RowLayout(getattr(spec, side), store.window.page_size)
                codes.append(rows.unpack(self._tensors[f"{layer}.{side}.codes"].to(device)))
                exact.append(self._tensors[f"{layer}.{side}.exact"].to(device))
            store.restore(layer, (codes[0], codes[1]), (exact[0], exact[1]))
        for index, layer in _own(cache):
            held = {name: self._tensors[f"own.{index}.{name}"] for name in self._own.get(index, ())}
            if held:
                restore_layer(layer, {name: tensor.to(device) for name, tensor in held.items()}, self._length)


def _own(cache: Cache) -> list[tuple[int, Any]]:
    """transformers' own layers, with their indices."""
    return [
        (i, layer)
        for i, layer in enumerate(cache.layers)
        if is_linear(layer) or hasattr(layer, "sliding_window")
    ]


def _digest(codebook: Codebook) -> str:
    """A hash of all that decodes codes: centroids, maps, blocks as the served model turns them."""
    tensors: dict[str, Tensor] = {}
    blocks = [rebase and (rebase.every, rebase.layout, rebase.gain) for rebase in codebook.keys.rebases]
    for i, rebase in enumerate(codebook.keys.rebases):
        if rebase is not None:
            tensors[f"frequencies.{i}"] = rebase.frequencies
    for name, side in (("keys", codebook.keys), ("values", codebook.values)):
        tensors.update({f"{name}.{i}": centroids for i, centroids in enumerate(side.centroids)})
        if side.transform is not None:
            tensors[f"{name}.encode"], tensors[f"{name}.decode"] = (
                side.transform.encode,
                side.transform.decode,
            )
    return content_hash(json.dumps(blocks), tensors)
