"""The definition of a store's content for tests: random codebooks, expected vectors, plain attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from million_cli.cache.store import CodeStore
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import decode, encode
from million_cli.pq.rebase import LAYOUTS, Rebase
from million_cli.pq.transform import Transform
from million_cli.spec import CodeSpec, WindowSpec

D, HKV = 8, 2


def random_pq(spec: CodeSpec, heads: int, map_heads: int, seed: int) -> LayerPQ:
    """Normal centroids for `heads` heads and random invertible maps (none for map_heads = 0)."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(heads, spec.M, spec.C, spec.dsub, generator=generator)
    transform = None
    if map_heads:
        normal = torch.randn(map_heads, spec.head_dim, spec.head_dim, generator=generator)
        stretch = 0.5 + torch.rand(map_heads, 1, spec.head_dim, generator=generator)
        transform = Transform.invertible((torch.linalg.qr(normal.double())[0] * stretch).float())
    return LayerPQ(spec, centroids, transform)


def random_layers(
    n: int = 1,
    keys: tuple[int, int] = (4, 4),
    values: tuple[int, int] = (2, 6),
    heads: int = HKV,
    map_heads: int = HKV,
    head_dim: int = D,
    rebase: int = 0,
) -> list[tuple[LayerPQ, LayerPQ]]:
    """Quantizers of n layers; `keys` and `values` are (M, nbits), the other way around in odd layers.

    rebase: tokens of the blocks that keys are relative to, rotated in part, in either layout; 0: none.
    """
    sides = CodeSpec(head_dim, *keys), CodeSpec(head_dim, *values)
    layers = []
    for i in range(n):
        k, v = sides[:: -1 if i % 2 else 1]
        of_keys = random_pq(k, heads, map_heads, 2 * i)
        if rebase:
            frequencies = 0.3 ** torch.arange(head_dim // 2 - 1, dtype=torch.float64)
            of_keys = replace(of_keys, rebase=Rebase(rebase, frequencies, LAYOUTS[i % 2], gain=1.25))
        layers.append((of_keys, random_pq(v, heads, map_heads, 2 * i + 1)))
    return layers


def random_qkv(
    T: int, B: int = 2, G: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query `[B, G * HKV, T, D]`, keys and values `[B, HKV, T, D]`."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, T, D, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HKV * G, HKV, HKV)
    )
    return q, k, v


def coded_vectors(x: Tensor, pq: LayerPQ, start: int = 0) -> Tensor:
    """x `[B, Hkv, T, D]`, tokens from `start` on, coded, decoded and mapped back, in its dtype."""
    return decode(encode(x, pq, start=start), pq, x.dtype, start=start)


def cropped(x: Tensor, pq: LayerPQ, window: WindowSpec, length: int) -> Tensor:
    """The vectors of a store of x `[B, Hkv, T, D]` after crop(length): decoded vectors stay coarse."""
    coded, length = window.coded_length(x.shape[2]), min(length, x.shape[2])
    x, again_exact = x[:, :, :length].clone(), slice(window.coded_length(length), coded)
    x[:, :, again_exact] = coded_vectors(x[:, :, again_exact], pq, again_exact.start)
    return x


def assert_holds(store: CodeStore, k: Tensor, v: Tensor, layer: int = 0, tolerance: float = 0.0) -> None:
    """The layer holds k and v: the oldest as codes, the rest exactly, cut as the closed form says.

    `tolerance` is for the exact part after a crop, where undoing a transform rounds by the number of tokens.
    """
    length, coded = k.shape[2], store.window.coded_length(k.shape[2])
    assert (store.length(layer), store.coded(layer)) == (length, coded)
    quantizers = store.quantizers[layer]
    readers, exact = store.codes(layer), store.exact(layer)
    for x, pq, codes, newest in zip((k, v), quantizers, readers, exact, strict=True):
        assert codes.length == coded
        assert torch.equal(codes.read(0, coded), encode(x[:, :, :coded], pq))
        assert newest.shape == x[:, :, coded:].shape
        assert ((newest - x[:, :, coded:]).abs() <= tolerance).all()


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pq: tuple[LayerPQ, LayerPQ],
    boundaries: Sequence[int],
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first_valid: Tensor | None = None,
) -> Tensor:
    """One softmax over all tokens, in float64: `[B, Hq, N, D]`, NaN where a query sees nothing.

    Query i sees decoded vectors below boundaries[i] and k, v from there on.
    """
    G, N, T = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
    keys, values = keys.double(), values.double()
    k, v, coded_k, coded_v = (
        x.repeat_interleave(G, dim=1)
        for x in (keys, values, coded_vectors(keys, pq[0]), coded_vectors(values, pq[1]))
    )
    as_code = torch.arange(T) < torch.tensor(list(boundaries))[:, None]  # [N, T]
    query = query.double()
    scores = torch.where(as_code, query @ coded_k.mT, query @ k.mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.arange(T) <= torch.arange(T - N, T)[:, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    if first_valid is not None:
        scores = scores.masked_fill(torch.arange(T) < first_valid.view(-1, 1, 1, 1), -torch.inf)
    if sinks is None:
        p = scores.softmax(-1)
    else:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        p = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return (p * as_code) @ coded_v + (p * ~as_code) @ v
