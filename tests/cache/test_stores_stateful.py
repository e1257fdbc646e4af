"""Any sequence of operations on both stores, against plain lists of vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from closed_form import HKV, D, assert_holds, cropped, dense_attention, random_layers
from examples import examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch_ops import TorchOps

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.graph_steps import GraphSteps
from million_cli.cache.page_manager import PagePoolExhausted
from million_cli.cache.paged import PagedStore
from million_cli.cache.store import CodeStore
from million_cli.cache.view import attend
from million_cli.spec import WindowSpec

pytestmark = pytest.mark.timeout(300)  # CI's profile has many examples

LAYERS, G = 2, 2
TOLERANCE = 1e-12


class Stores(RuleBasedStateMachine):
    """The model is what was appended: keys and values `[B, HKV, T, D]` a layer, made coarse by crops.

    The paged store has a small pool or one that grows; when it runs out it becomes contiguous, as in a run.
    It works in torch or by compiled operations, here their definitions, until these are said to have failed.
    """

    @initialize(
        window=st.sampled_from([WindowSpec(16, 32), WindowSpec(16, 64), WindowSpec(32, 64)]),
        prefill=st.sampled_from(["exact", "quantized"]),
        max_pages=st.sampled_from([None, 8, 40]),
        mapped=st.booleans(),
        ops=st.sampled_from([None, "other layouts", "fragments"]),
        pages_a_block=st.integers(0, 4),
        seed=st.integers(0, 1 << 20),
    )
    def start(self, window, prefill, max_pages, mapped, ops, pages_a_block, seed):
        torch.manual_seed(seed)
        self.window, self.prefill = window, prefill
        codes = {"keys": (32, 8), "values": (16, 8)} if ops == "fragments" else {"values": (2, 5)}
        self.head_dim = 64 if ops == "fragments" else D
        codes |= {"map_heads": HKV if mapped else 0, "rebase": pages_a_block * window.page_size}
        self.layers = random_layers(LAYERS, head_dim=self.head_dim, **codes)
        self.contiguous = ContiguousStore(
            self.layers, window, prefill=prefill, ops=TorchOps("contiguous") if ops else None
        )
        self.paged = PagedStore(
            self.layers, window, prefill=prefill, max_pages=max_pages, ops=TorchOps() if ops else None
        )
        self.second: CodeStore = self.paged  # or what the paged store became
        self.vectors: list[tuple[Tensor, Tensor]] | None = None

    @property
    def stores(self) -> tuple[CodeStore, CodeStore]:
        return self.contiguous, self.second

    @property
    def batch(self) -> int:
        return 0 if self.vectors is None else self.vectors[0][0].shape[0]

    def fall_back(self) -> None:
        before = self.paged.page_stats
        lengths = [self.paged.length(i) for i in range(LAYERS)]
        assert lengths == ([0] * LAYERS if self.vectors is None else [k.shape[2] for k, _ in self.vectors])
        self.check()  # what failed changed nothing
        assert before == self.paged.page_stats
        self.second = self.paged.to_contiguous(self.ops_of_the_fallback())
        assert self.paged.page_stats.in_use == 0

    def ops_of_the_fallback(self) -> TorchOps | None:
        return None if self.paged.ops is None else TorchOps("contiguous")

    @rule(N=st.one_of(st.just(1), st.integers(1, 70)), batch=st.integers(1, 3))
    def append(self, N: int, batch: int) -> None:
        """One forward pass: all layers, the first first."""
        self.begin_text(batch)
        first_valid = self.some_padding(N)
        for layer in range(LAYERS):
            self.append_layer(layer, N, first_valid)

    @rule(N=st.integers(1, 70), batch=st.integers(1, 2), data=st.data())
    def branch_amid_a_pass(self, N: int, batch: int, data) -> None:
        """The batch is reindexed while the layers differ in length."""
        self.begin_text(batch)
        self.append_layer(0, N, None)
        indices = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        self.branch(lambda store: store.select(torch.tensor(indices)), indices)
        for layer in range(1, LAYERS):
            self.append_layer(layer, N, None)

    @precondition(lambda self: self.batch and self.second.ops is not None and self.filled)
    @rule(ahead=st.integers(1, 40), steps=st.integers(1, 40))
    def graph_steps(self, ahead: int, steps: int) -> None:
        """Steps as a CUDA graph replays them: room is made ahead, the host's counts follow."""
        ahead = max(ahead, steps)
        stores = [store for store in self.stores if self.reserve_in(store, ahead)]
        if len(stores) < len(self.stores):
            return
        views = [GraphSteps(store) for store in stores]
        try:
            for view in views:
                view.begin()
        except PagePoolExhausted:
            return
        for _ in range(steps):
            start = self.length()
            for store in stores:
                store.prepare_steps()
            for layer in range(LAYERS):
                k, v = torch.randn(2, self.batch, HKV, self.head_dim, dtype=torch.float64)
                q = torch.randn(self.batch, HKV * G, self.head_dim, dtype=torch.float64)
                out = [view.step(layer, q, k, v, scale=0.7, first_valid=None) for view in views]
                assert torch.equal(*out)
                self.add(layer, k[:, :, None], v[:, :, None])
                coded = self.window.coded_length(start + 1)
                expected = dense_attention(
                    q[:, :, None], *self.vectors[layer], self.layers[layer], [coded], scale=0.7
                )
                assert ((out[0] - expected[:, :, 0]).abs() <= 1e-11).all()
            for view in views:
                view.advance()

    @precondition(lambda self: self.batch and self.filled)
    @rule(ahead=st.integers(0, 120))
    def reserve(self, ahead: int) -> None:
        for store in self.stores:
            self.reserve_in(store, ahead)

    def reserve_in(self, store: CodeStore, ahead: int) -> bool:
        before = self.paged.page_stats
        try:
            store.reserve(self.length() + ahead)
        except PagePoolExhausted:
            assert store is self.paged
            assert before == self.paged.page_stats
            return False
        assert store.is_reserved(self.length() + ahead)
        return True

    @property
    def filled(self) -> bool:
        """Whether every layer has been appended to since memory was released."""
        return self.vectors is not None

    def length(self) -> int:
        assert self.vectors is not None
        return self.vectors[0][0].shape[2]

    def begin_text(self, batch: int) -> None:
        if self.vectors is None:
            empty = torch.empty(batch, HKV, 0, self.head_dim, dtype=torch.float64)
            self.vectors = [(empty, empty)] * LAYERS

    def some_padding(self, N: int) -> Tensor | None:
        return torch.randint(0, self.length() + 2, (self.batch,)) if N % 3 == 0 else None

    def add(self, layer: int, k: Tensor, v: Tensor) -> None:
        old_k, old_v = self.vectors[layer]
        self.vectors[layer] = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)

    def append_layer(self, layer: int, N: int, first_valid: Tensor | None) -> None:
        """Append N tokens to one layer of both stores, and let them attend."""
        k, v = torch.randn(2, self.batch, HKV, N, self.head_dim, dtype=torch.float64)
        q = torch.randn(self.batch, HKV * G, N, self.head_dim, dtype=torch.float64)
        start = self.vectors[layer][0].shape[2]
        try:
            view = self.second.append(layer, k, v)
        except PagePoolExhausted:
            self.fall_back()
            view = self.second.append(layer, k, v)
        views = self.contiguous.append(layer, k, v), view
        out = [attend(q, x, scale=0.7, first_valid=first_valid) for x in views]
        assert torch.equal(*out)
        for store, x in zip(self.stores, views, strict=True):
            assert (x.device_layer is not None) == (store.ops is not None and N == 1)
            if x.device_layer is not None:
                by_ops = store.attend(q, x, scale=0.7, first_valid=first_valid)
                assert torch.equal(by_ops, out[0])
        self.add(layer, k, v)
        seen = [t + 1 if N == 1 or self.prefill == "quantized" else start for t in range(start, start + N)]
        boundaries = [self.window.coded_length(t) for t in seen]
        expected = dense_attention(
            q, *self.vectors[layer], self.layers[layer], boundaries, scale=0.7, first_valid=first_valid
        )
        assert ((out[0] - expected).abs().nan_to_num(0) <= 1e-11).all()

    def branch(self, change: Callable[[CodeStore], None], taken: list[int]) -> None:
        """Reindex the batch of both stores; the paged one may have no room for copies."""
        try:
            change(self.second)
        except PagePoolExhausted:
            self.fall_back()
            change(self.second)
        change(self.contiguous)
        self.vectors = [(k[taken], v[taken]) for k, v in self.vectors]

    @precondition(lambda self: self.batch)
    @rule(share=st.floats(0, 1.1))
    def crop(self, share: float) -> None:
        assert self.vectors is not None
        length = int(share * self.vectors[0][0].shape[2])
        for store in self.stores:
            store.crop(length)
        self.vectors = [
            (cropped(k, pq_k, self.window, length), cropped(v, pq_v, self.window, length))
            for (k, v), (pq_k, pq_v) in zip(self.vectors, self.layers, strict=True)
        ]

    @precondition(lambda self: self.batch)
    @rule(data=st.data())
    def reorder(self, data) -> None:
        B = self.batch
        beams = data.draw(st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
        self.branch(lambda store: store.reorder(torch.tensor(beams)), beams)

    @precondition(lambda self: self.batch)
    @rule(data=st.data())
    def select(self, data) -> None:
        indices = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        self.branch(lambda store: store.select(torch.tensor(indices)), indices)

    @precondition(lambda self: 0 < self.batch <= 2)
    @rule(repeats=st.integers(1, 3))
    def repeat_interleave(self, repeats: int) -> None:
        taken = [b for b in range(self.batch) for _ in range(repeats)]
        self.branch(lambda store: store.repeat_interleave(repeats), taken)

    @precondition(lambda self: self.paged.ops is not None)
    @rule()
    def kernel_fails(self) -> None:
        """From here on torch reads and writes the tensors that the operations laid out."""
        for store in (*self.stores, self.paged):
            store.ops = None

    @precondition(lambda self: self.batch)
    @rule()
    def rewind(self) -> None:
        """Forget the text, keep the tensors: the same batch starts again, in the same places."""
        B, places = self.batch, [tensor.data_ptr() for tensor in self.tensors()]
        for store in self.stores:
            store.reset(release=False)
            assert (store.batch, store.length(), store.coded()) == (B, 0, 0)
        assert [tensor.data_ptr() for tensor in self.tensors()] == places
        empty = torch.empty(B, HKV, 0, self.head_dim, dtype=torch.float64)
        self.vectors = [(empty, empty)] * LAYERS

    def tensors(self) -> list[Tensor]:
        if self.second is not self.paged:
            return []
        windows = [state.window for state in self.paged._layers]
        pools = [tensor for pools in self.paged._pools for tensor in pools or ()]
        return [*(w.keys for w in windows if w), *pools, self.paged.block_table()]

    @precondition(lambda self: self.batch)
    @rule()
    def reset(self) -> None:
        for store in self.stores:
            store.reset()
            assert store.memory()["total"] == 0
        self.vectors = None

    @invariant()
    def check(self) -> None:
        if self.vectors is None:
            return
        for layer, (k, v) in enumerate(self.vectors):
            for store in self.stores:
                if store._layers[layer].window is None:  # amid the first pass, or before it
                    assert store.length(layer) == k.shape[2] == 0
                    continue
                assert_holds(store, k, v, layer, tolerance=TOLERANCE)
        for layer, _ in enumerate(self.vectors):
            if self.second._layers[layer].window is not None:
                for a, b in zip(self.contiguous.exact(layer), self.second.exact(layer), strict=True):
                    assert torch.equal(a, b)

    @invariant()
    def pages_belong_to_sequences(self) -> None:
        """Held pages are those in the block table, each as often as it occurs there.

        A page that some layer has still to write occurs once.
        """
        columns = self.paged._pages if self.second is self.paged else 0
        held = Counter(self.paged.block_table()[:, :columns].flatten().tolist())
        manager = self.paged._manager
        assert manager.stats.in_use == len(held)
        assert all(manager.refcount(page) == n for page, n in held.items())
        if columns:
            written = min(self.paged.coded(layer) for layer in range(LAYERS)) // self.window.page_size
            unwritten = self.paged.block_table()[:, written:columns].flatten().tolist()
            assert all(held[page] == 1 for page in unwritten)


TestStores = Stores.TestCase
TestStores.settings = examples(60, stateful_step_count=14)
