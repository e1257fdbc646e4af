"""Any sequence of operations on stores that kernels serve, beside the same stores in torch.

Codes may differ where a vector lies between two centroids; then the vectors that a crop decodes differ too.
So both are judged by attention: the kernels' in half precision, from torch's in half precision over its own
codes.  Positions, batches and pages must agree exactly.
"""

from __future__ import annotations

import random

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.graph_steps import GraphSteps
from million_cli.cache.paged import PagedStore
from million_cli.cache.store import CodeStore
from million_cli.cache.view import attend
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import CodeSpec, WindowSpec

LAYERS, HKV, GROUP, D = 2, 2, 4, 64
LONGEST, BATCHES = 400, 4
OPERATIONS = 60
TYPICAL, WORST = 0.02, 0.2  # error of an output over the spread of all: of the typical one, of any


def layers(seed: int) -> list[tuple[LayerPQ, LayerPQ]]:
    generator = torch.Generator().manual_seed(seed)

    def side(M: int) -> LayerPQ:
        spec = CodeSpec(D, M, 8)
        return LayerPQ(spec, torch.randn(HKV, M, spec.C, spec.dsub, generator=generator).to(DEVICE))

    return [(side(32), side(16)) for _ in range(LAYERS)]


class Pair:
    """Two stores of one kind, by kernels and in torch, that are told the same."""

    def __init__(self, store: type[CodeStore], seed: int) -> None:
        self.random = random.Random(seed)
        self.window = self.random.choice([WindowSpec(16, 32), WindowSpec(32, 96), WindowSpec(64, 128)])
        quantizers = layers(seed)
        prefill = self.random.choice(["exact", "quantized"])
        self.kernel = store(quantizers, self.window, prefill=prefill, ops=store.compiled_ops())
        self.torch = store(quantizers, self.window, prefill=prefill)
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    @property
    def both(self) -> tuple[CodeStore, CodeStore]:
        return self.kernel, self.torch

    @property
    def batch(self) -> int:
        return self.torch.batch or 0

    @property
    def length(self) -> int:
        return self.torch.length()

    def vectors(self, B: int, heads: int, N: int) -> Tensor:
        shape = (B, heads, N, D)
        return torch.randn(shape, generator=self.generator, device=DEVICE).half()

    def append(self, N: int) -> None:
        B = self.batch or self.random.randint(1, 3)
        for layer in range(LAYERS):
            k, v = self.vectors(B, HKV, N), self.vectors(B, HKV, N)
            query = self.vectors(B, HKV * GROUP, N)
            views = [store.append(layer, k, v) for store in self.both]
            expected = attend(query, views[1], scale=D**-0.5)
            if N == 1:
                assert_close(self.kernel.attend(query, views[0], scale=D**-0.5), expected)
            else:
                assert_close(attend(query, views[0], scale=D**-0.5), expected)

    def graph_steps(self, steps: int) -> None:
        """Steps by the device's own lengths, into pages that were reserved, told to the host at the end."""
        self.kernel.reserve(self.length + steps)
        graph = GraphSteps(self.kernel)
        graph.begin()
        for ahead in range(steps):
            self.kernel.prepare_steps(ahead)
            for layer in range(LAYERS):
                k, v = self.vectors(self.batch, HKV, 1), self.vectors(self.batch, HKV, 1)
                query = self.vectors(self.batch, HKV * GROUP, 1)
                ours = graph.step(
                    layer, query[:, :, 0], k[:, :, 0], v[:, :, 0], scale=D**-0.5, first_valid=None
                )
                view = self.torch.append(layer, k, v)
                assert_close(ours[:, :, None], attend(query, view, scale=D**-0.5))
        graph.advance(steps)

    def operate(self) -> None:
        if not self.length:
            self.append(self.random.randint(2, 150))
            return
        kinds = [
            "append",
            "append",
            "steps",
            "graph",
            "reserve",
            "crop",
            "reorder",
            "select",
            "repeat",
            "reset",
        ]
        kind = self.random.choice(kinds)
        if kind in ("append", "steps", "graph") and self.length > LONGEST:
            kind = "crop"
        if kind == "append":
            self.append(self.random.randint(1, 90))
        elif kind == "steps":
            for _ in range(self.random.randint(1, 5)):
                self.append(1)
        elif kind == "graph":
            self.graph_steps(self.random.randint(1, 5))
        elif kind == "reserve":
            self.kernel.reserve(self.length + self.random.randint(1, 200))
        elif kind == "crop":
            length = self.random.randint(0, self.length)
            for store in self.both:
                store.crop(length)
        elif kind == "reset":
            release = self.random.random() < 0.5
            for store in self.both:
                store.reset(release)
        elif kind == "repeat" and 2 * self.batch <= BATCHES:
            for store in self.both:
                store.repeat_interleave(2)
        else:
            size = self.batch if kind == "reorder" else self.random.randint(1, BATCHES)
            indices = torch.tensor([self.random.randrange(self.batch) for _ in range(size)])
            for store in self.both:
                (store.reorder if kind == "reorder" else store.select)(indices)

    def check(self) -> None:
        assert self.kernel.batch == self.torch.batch
        for layer in range(LAYERS):
            assert self.kernel.length(layer) == self.torch.length(layer)
            assert self.kernel.coded(layer) == self.torch.coded(layer)
        if self.length:
            for layer in range(LAYERS):
                for ours, theirs in zip(self.kernel.codes(layer), self.torch.codes(layer), strict=True):
                    coded = self.torch.coded(layer)
                    same = (ours.read(0, coded) == theirs.read(0, coded)).float()
                    assert not coded or same.mean() > 0.98  # the rest are ties within rounding


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert bool(ours.isfinite().all())
    errors = (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1).mean()
    assert errors.median() < TYPICAL, errors.median()
    assert errors.max() < WORST, errors.max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("store", [PagedStore, ContiguousStore])
def test_kernels_and_torch_agree_after_any_operations(store: type[CodeStore], seed: int) -> None:
    pair = Pair(store, seed)
    for _ in range(OPERATIONS):
        pair.operate()
        pair.check()
