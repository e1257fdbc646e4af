"""Caches whose decode steps run on the compiled kernels, inside models, against the same caches in torch.

The measure is the caches' own: logits of the model in float32 with a torch cache are the reference, and the
kernels in half precision may be twice as far from them as torch in half precision is; three times where
scores come from a table, whose entries are rounded to fp16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from cases import DEVICE
from random_codebook import random_codebook
from torch import Tensor
from transformers import PreTrainedModel

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.paged import PagedStore
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.models import random_model
from million_cli.hf.padding import LeftPadding, padding_mask
from million_cli.hf.pq_cache import PQCache
from million_cli.ops.compiled_store import CompiledPaged
from million_cli.pq.codebook import Codebook
from million_cli.spec import WindowSpec

VOCABULARY, KV_HEADS = 97, 2
SMALL = WindowSpec(page_size=16, residual=32)
F16, BF16 = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A random Llama and its codebook: heads `KV_HEADS * group`, codes of 8 bits in the given subspaces."""

    head_dim: int = 128
    group: int = 4
    dtype: torch.dtype = F16
    m_keys: int = 64
    m_values: int = 64
    mapped: bool = True
    mixed: bool = False
    window: WindowSpec = SMALL


CASES = [
    Case(),
    Case(group=1),
    Case(group=8, dtype=BF16),
    Case(group=1, dtype=BF16, m_values=32, mapped=False),
    Case(group=16, m_keys=32, m_values=32),
    Case(64, 1, F16, 32, 32),
    Case(64, 4, BF16, 32, 16, window=WindowSpec(64, 128)),
    Case(64, 8, F16, 16, 32, mapped=False),
    Case(window=WindowSpec(48, 144)),
    Case(m_values=32, mixed=True),
]


@lru_cache
def models(case: Case) -> tuple[PreTrainedModel, PreTrainedModel, Codebook]:
    """The model in the case's dtype, the same in float32, their codebook."""
    hidden = 256
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": KV_HEADS * case.group,
        "num_key_value_heads": KV_HEADS,
        "head_dim": case.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "initializer_range": hidden**-0.5,  # K and V as large as the centroids
    }
    model = random_model(config, dtype=case.dtype, device=DEVICE)
    codebook = random_codebook(model, (case.m_keys, 8), (case.m_values, 8), case.mapped, case.mixed)
    return model, copy.deepcopy(model).float(), codebook


def random_ids(B: int, T: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)


class Runs:
    """The same text through three caches: kernels, torch in the same dtype, torch in float32."""

    def __init__(self, case: Case, store: str = "paged", **options: Any) -> None:
        self.model, self.exact_model, codebook = models(case)
        cache_class = PagedPQCache if store == "paged" else DynamicPQCache
        self.kernel: PQCache = cache_class(self.model, codebook, case.window, **options)
        assert str(self.kernel.backend) == f"{store} kernel", self.kernel.backend
        self.factor = 2 if store == "paged" else 3
        self.torch = DynamicPQCache(self.model, codebook, case.window, compute="torch")
        self.exact = DynamicPQCache(self.exact_model, codebook, case.window, compute="torch")
        self.squares = torch.zeros(3, dtype=torch.float64, device=DEVICE)

    @property
    def caches(self) -> tuple[PQCache, PQCache, PQCache]:
        return self.kernel, self.torch, self.exact

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Next tokens through all three; decode steps count for the comparison."""
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = [
            model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits.double()
            for model, cache in zip((self.model, self.model, self.exact_model), self.caches, strict=True)
        ]
        assert all(x.isfinite().all() for x in logits)
        if ids.shape[1] == 1:
            ours, own, exact = logits
            for i, x in enumerate((exact, ours - exact, own - exact)):
                self.squares[i] += x.square().sum()

    def decode(self, ids: Tensor, start: int, mask: Tensor | None = None) -> None:
        for t in range(start, ids.shape[1]):
            self.forward(ids[:, t : t + 1], None if mask is None else mask[:, : t + 1])

    def check(self) -> None:
        size, ours, own = self.squares.sqrt().tolist()
        assert size > 0
        assert ours <= self.factor * own + 1e-3 * size, (ours / size, own / size)

    def check_codes(self) -> None:
        """The first layer's inputs are the same, so are its codes but for ties."""
        for ours, theirs in zip(self.kernel.store.codes(0), self.torch.store.codes(0), strict=True):
            assert ours.length == theirs.length > 0
            a, b = ours.read(0, ours.length), theirs.read(0, theirs.length)
            assert int((a != b).sum()) <= 2e-4 * a.numel() + 2


@pytest.mark.parametrize("prompt", [3, 150])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_steps(case: Case, prompt: int) -> None:
    runs, ids = Runs(case, strict=True), random_ids(2, prompt + 80 + case.window.residual)
    runs.forward(ids[:, :prompt])
    runs.decode(ids, prompt)
    runs.check()
    runs.check_codes()
    assert runs.kernel.fallbacks == ()


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]], ids=str)
def test_decode_steps_over_contiguous_codes(case: Case) -> None:
    for prompt in (3, 150):
        runs = Runs(case, "contiguous", strict=True)
        ids = random_ids(2, prompt + 80 + case.window.residual)
        runs.forward(ids[:, :prompt])
        runs.decode(ids, prompt)
        runs.check()
        runs.check_codes()


@pytest.mark.parametrize("store", ["paged", "contiguous"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_left_padding(case: Case, store: str) -> None:
    runs, ids = Runs(case, store, strict=True), random_ids(3, 140)
    mask = (torch.arange(140, device=DEVICE) >= torch.tensor([[0], [17], [70]], device=DEVICE)).long()
    runs.forward(ids[:, :80], mask[:, :80])
    runs.decode(ids, 80, mask)
    runs.check()


def test_padding_with_holes_goes_to_torch() -> None:
    runs, ids = Runs(CASES[0]), random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[1, 20:23] = 0
    runs.forward(ids[:, :60], mask[:, :60])
    runs.decode(ids, 60, mask)
    runs.check()
    assert [fallback.reason for fallback in runs.kernel.fallbacks] == ["an attention mask with holes"]


def test_prefill_in_chunks_and_turns() -> None:
    runs, ids = Runs(CASES[0], strict=True), random_ids(2, 230)
    for start, stop in ((0, 40), (40, 100), (130, 200)):
        runs.forward(ids[:, start:stop])
        runs.decode(ids[:, : stop + 30], stop)
    runs.check()
    runs.check_codes()


@pytest.mark.parametrize("store", ["paged", "contiguous"])
def test_batch_operations_and_crop(store: str) -> None:
    runs, ids = Runs(CASES[0], store, strict=True), random_ids(4, 200)
    runs.forward(ids[:3, :90])
    runs.decode(ids[:3, :110], 90)
    for cache in runs.caches:
        cache.reorder_cache(torch.tensor([2, 0, 0], device=DEVICE))
    runs.decode(ids[:3, :130], 110)
    for cache in runs.caches:
        cache.batch_select_indices(torch.tensor([2, 1], device=DEVICE))
        cache.batch_repeat_interleave(2)
    runs.decode(ids[:, :150], 130)
    for cache in runs.caches:
        cache.crop(-30)
    runs.decode(ids[:, :180], 120)
    runs.check()


def test_generate_with_beams_on_padded_batches() -> None:
    model, _, codebook = models(CASES[0])
    ids = random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    cache = PagedPQCache(model, codebook, SMALL, strict=True)
    for options in ({"num_beams": 3}, {"do_sample": True}):
        tokens = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=50, min_new_tokens=50, **options
        )
        assert tokens.shape == (2, 110)
        assert str(cache.backend) == "paged kernel"
        cache.reset()
    assert cache.fallbacks == ()


def test_exhausted_pool_goes_on_contiguously_with_the_same_codes() -> None:
    runs, ids = Runs(CASES[0], max_pages=14), random_ids(2, 200)
    runs.factor = 3
    runs.forward(ids[:, :100])
    before: list[Tensor] = []
    for t in range(100, 200):
        if runs.kernel.backend.store == "paged":
            before = [codes.read(0, codes.length) for codes in runs.kernel.store.codes(1)]
        runs.forward(ids[:, t : t + 1])
    (fallback,) = runs.kernel.fallbacks
    assert (fallback.wanted, fallback.got) == ("paged kernel", "contiguous kernel")
    assert isinstance(runs.kernel.store, ContiguousStore)
    for codes, old in zip(runs.kernel.store.codes(1), before, strict=True):
        assert old.shape[2] == 7 * SMALL.page_size
        assert torch.equal(codes.read(0, old.shape[2]), old)
    runs.check()
    runs.check_codes()


def test_caches_without_a_kernel_say_why() -> None:
    _, exact_model, codebook = models(CASES[0])
    for cache_class in (PagedPQCache, DynamicPQCache):
        cache = cache_class(exact_model, codebook, SMALL)
        assert cache.backend.compute == "torch"
        assert "float32" in cache.fallbacks[0].reason


# -- one step, by itself -------------------------------------------------------------------------------------


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


class Steps:
    """A store of one layer at 100 tokens a sequence, and random tokens to append."""

    def __init__(self, max_pages: int | None = 200) -> None:
        codebook = models(CASES[0])[2]
        self.store = PagedStore(
            [(codebook.keys.layer(0), codebook.values.layer(0))],
            SMALL,
            max_pages=max_pages,
            ops=CompiledPaged(),
        )
        torch.manual_seed(0)
        self.prompt = torch.randn(2, 2, KV_HEADS, 100, 128, device=DEVICE).half()
        self.tokens = torch.randn(2, 200, 2, KV_HEADS, 1, 128, device=DEVICE).half()
        self.queries = torch.randn(200, 2, KV_HEADS * 4, 1, 128, device=DEVICE).half()
        self.store.append(0, *self.prompt)

    def step(self, i: int, first_valid: Tensor | None = None) -> Tensor:
        view = self.store.append(0, self.tokens[0, i], self.tokens[1, i])
        return self.store.attend(self.queries[i], view, scale=0.1, first_valid=first_valid)


@pytest.fixture
def steps() -> Steps:
    steps = Steps()
    for i in range(16):  # across a page, so that everything is there
        steps.step(i)
    return steps


def test_a_step_does_not_wait_for_the_device(steps: Steps, no_synchronisation: None) -> None:
    padding, seen = LeftPadding(), torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
    torch.cuda.set_sync_debug_mode("default")
    seen[1, :9] = False
    assert padding.read(padding_mask(2, 1, 116, 115, attention_mask=seen[:, :116]))[1] is None
    torch.cuda.set_sync_debug_mode("error")
    due = next(n for n in range(116, 140) if SMALL.coded_length(n + 1) > SMALL.coded_length(n))
    for i in range(16, 16 + due - 116):
        T = 100 + i + 1
        first_valid, reason = padding.read(padding_mask(2, 1, T, T - 1, attention_mask=seen[:, :T]))
        assert reason is None
        steps.step(i, first_valid)


def test_places_are_kept_over_pages_reorders_and_a_rewind(steps: Steps) -> None:
    def places() -> list[int]:
        pages = steps.store.device_layer(0)
        assert pages.block_table is not None
        tensors = (
            pages.key_codes,
            pages.value_codes,
            pages.block_table,
            pages.key_window,
            pages.value_window,
            pages.lengths,
        )
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    for i in range(16, 60):
        steps.step(i)
    steps.store.reorder(torch.tensor([1, 0]))
    assert places() == before
    steps.store.reset(release=False)
    steps.store.append(0, *steps.prompt)
    assert places() == before
    again, fresh = steps, Steps()
    for i in range(60):
        assert torch.equal(again.step(i), fresh.step(i))


def test_growing_pool_gives_the_same_results() -> None:
    fixed, growing = Steps(), Steps(max_pages=None)
    for i in range(120):
        assert torch.equal(fixed.step(i), growing.step(i))
