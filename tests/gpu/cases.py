"""Random caches of codes for the GPU tests, and attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from million_cli.ops import compiled
from million_cli.ops.fragment import FragmentLayout
from million_cli.spec import CodeSpec, WindowSpec

DEVICE = torch.device("cuda")


@dataclass
class Shape:
    """What a case is drawn from; `tables` and `rotations` are per KV head if "head"."""

    lengths: list[int]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    m_keys: int = 64
    m_values: int = 64
    window: WindowSpec = field(default_factory=WindowSpec)
    dtype: torch.dtype = torch.float16
    tables: str = "head"
    rotations: str | None = None
    first_valid: list[int] | None = None
    scores: str = "normal"  # "equal", "dominant" or "wide" (logits to +-30)
    spare_pages: int = 3  # of the pools, among those that are used
    seed: int = 0


class Case:
    """Tensors of a random cache of `shape`, on the GPU."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        torch.manual_seed(shape.seed)
        B, Hkv, D = len(shape.lengths), shape.kv_heads, shape.head_dim
        P, R, dtype = shape.window.page_size, shape.window.residual, shape.dtype
        self.scale = D**-0.5
        self.key_layout = FragmentLayout(CodeSpec(D, shape.m_keys, 8), P, "keys")
        self.value_layout = FragmentLayout(CodeSpec(D, shape.m_values, 8), P, "values")
        self.coded = [shape.window.coded_length(n) for n in shape.lengths]
        width = max(self.coded) // P + 1
        pages = B * width + shape.spare_pages
        self.block_table = torch.randperm(pages, device=DEVICE)[: B * width].int().view(B, width)
        self.key_pool, self.value_pool = (
            torch.randint(0, 256, (pages, Hkv, *layout.page_shape), dtype=torch.uint8, device=DEVICE)
            for layout in (self.key_layout, self.value_layout)
        )
        Hc = Hkv if shape.tables == "head" else 1
        self.key_centroids = (
            torch.randn(Hc, shape.m_keys, 256, D // shape.m_keys, device=DEVICE).half().float()
        )
        self.value_centroids = (
            torch.randn(Hc, shape.m_values, 256, D // shape.m_values, device=DEVICE).half().float()
        )
        if shape.scores == "equal":
            self.key_centroids[:] = self.key_centroids[:, :, :1]
        self.key_rotation = self.value_rotation = None
        if shape.rotations is not None:
            Hr = Hkv if shape.rotations == "head" else 1
            self.key_rotation, self.value_rotation = (
                torch.linalg.qr(torch.randn(Hr, D, D, device=DEVICE))[0].contiguous() for _ in range(2)
            )
        self.key_window, self.value_window = (
            torch.randn(B, Hkv, R, D, dtype=dtype, device=DEVICE) for _ in range(2)
        )
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)
        self.first_valid = None
        if shape.first_valid is not None:
            self.first_valid = torch.tensor(shape.first_valid, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(B, shape.q_heads, D, device=DEVICE)
        if shape.scores == "wide":
            self.q *= 10.0
        if shape.scores == "dominant":  # the direction of one coded (or window) key of each sequence
            G = shape.q_heads // Hkv
            for b in range(B):
                k, _ = self.dense(b)
                self.q[b] = 3.0 * k[:, k.shape[1] // 3].repeat_interleave(G, 0).float()
        self.q = self.q.to(dtype)

    def decoded(self, b: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, n, D] in float64 of sequence b's tokens first .. last - 1, whole pages."""
        shape, D, P = self.shape, self.shape.head_dim, self.shape.window.page_size
        ids = self.block_table[b, first // P : last // P].long()
        both = []
        for layout, pool, centroids, rotation in (
            (self.key_layout, self.key_pool, self.key_centroids, self.key_rotation),
            (self.value_layout, self.value_pool, self.value_centroids, self.value_rotation),
        ):
            codes = layout.unpack(pool[ids]).transpose(0, 1).flatten(1, 2).long()  # [Hkv, n, M]
            table = centroids.double().expand(shape.kv_heads, -1, -1, -1)
            head = torch.arange(shape.kv_heads, device=DEVICE)[:, None, None]
            subspace = torch.arange(layout.spec.M, device=DEVICE)
            x = table[head, subspace, codes].reshape(shape.kv_heads, last - first, D)
            if rotation is not None:
                x = x @ rotation.double().expand(shape.kv_heads, D, D).transpose(1, 2)
            both.append(x)
        return both[0], both[1]

    def newest(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, n, D] in float64 of the tokens of sequence b that are in the window."""
        R = self.shape.window.residual
        slots = torch.arange(self.coded[b], self.shape.lengths[b], device=DEVICE) % R
        return self.key_window[b][:, slots].double(), self.value_window[b][:, slots].double()

    def dense(self, b: int) -> tuple[Tensor, Tensor]:
        """Decoded keys and values [Hkv, T, D] of sequence b in float64, padding left out."""
        start = self.shape.first_valid[b] if self.shape.first_valid else 0
        both = zip(self.decoded(b, 0, self.coded[b]), self.newest(b), strict=True)
        keys, values = (torch.cat(parts, 1)[:, start:] for parts in both)
        return keys, values

    def decode(self, plan: compiled.DecodePlan | None = None, out: Tensor | None = None) -> Tensor:
        B, Hq, D = self.q.shape
        plan = plan or compiled.DecodePlan.make(B, Hq, self.shape.kv_heads, D, DEVICE)
        return compiled.paged_decode(
            self.q, self.key_pool, self.value_pool, self.block_table, self.lengths, self.first_valid,
            compiled.code_major(self.key_centroids), compiled.code_major(self.value_centroids),
            self.key_rotation, self.value_rotation, self.key_window, self.value_window,
            plan, scale=self.scale, page_size=self.shape.window.page_size, out=out,
        )  # fmt: skip

    def errors(self, got: Tensor) -> tuple[float, float]:
        """Relative errors of `got` [B, Hq, D] and of torch's attention in the same dtype, to float64."""
        squares = torch.zeros(3, dtype=torch.float64, device=DEVICE)
        for b in range(len(self.shape.lengths)):
            k, v = self.dense(b)
            exact = attention(self.q[b].double(), k, v, self.scale)
            torch_own = attention(self.q[b], k.to(self.q.dtype), v.to(self.q.dtype), self.scale)
            squares[0] += exact.square().sum()
            squares[1] += (got[b].double() - exact).square().sum()
            squares[2] += (torch_own.double() - exact).square().sum()
        size, ours, own = squares.sqrt().tolist()
        return ours / size, own / size


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [Hq, D], k and v [Hkv, T, D] -> [Hq, D]; zeros if there is no token."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    out = F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], scale=scale, enable_gqa=True)
    return out[0, :, 0]
