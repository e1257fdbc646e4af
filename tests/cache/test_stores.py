"""The properties of the stores, one a test; `test_stores_stateful.py` mixes the operations.

Long because every property is checked on the same matrix of stores, codes and windows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_form import HKV, D, assert_holds, cropped, dense_attention, random_layers, random_qkv
from torch import Tensor

from million_cli.cache import paged
from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.page_manager import PagePoolExhausted
from million_cli.cache.paged import PagedStore
from million_cli.cache.store import CodeStore
from million_cli.cache.view import attend
from million_cli.errors import UserError
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import WindowSpec

STORES = [ContiguousStore, PagedStore]
SMALL = WindowSpec(page_size=16, residual=32)


def feed(
    store: CodeStore, q: Tensor, k: Tensor, v: Tensor, sizes: list[int], layer: int = 0, **options: Any
) -> Tensor:
    """Append and attend in chunks of `sizes` tokens; the outputs side by side."""
    out, start = [], 0
    mask = options.pop("mask", None)
    for n in sizes:
        part = slice(start, start + n)
        view = store.append(layer, k[:, :, part], v[:, :, part])
        rows = None if mask is None else mask[:, :, part, : start + n]
        out.append(attend(q[:, :, part], view, scale=0.5, mask=rows, **options))
        start += n
    return torch.cat(out, dim=2)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To float64's rounding, where the expectation is defined; finite everywhere."""
    assert actual.isfinite().all()
    assert ((actual - expected).abs().nan_to_num(0) <= 1e-12).all()


# -- what queries see ----------------------------------------------------------------------------------------

QUANTIZERS = {
    "merged 8 bits": {"keys": (4, 8), "values": (4, 8), "heads": 1, "map_heads": 0},
    "per head, mapped": {},
    "keys finer": {"keys": (8, 5), "values": (2, 3), "heads": HKV, "map_heads": 1},
    "codes of two bytes": {"keys": (4, 9), "values": (2, 10), "heads": 1, "map_heads": HKV},
    "blocks of a page": {"rebase": 16},
    "blocks of two pages, no map": {"rebase": 32, "map_heads": 0},
    "blocks of three pages": {"rebase": 48, "heads": 1, "map_heads": 1},
    "blocks of four pages, neighbours": {"rebase": 64, "n": 2},
}
PADDED = torch.tensor([0, 37])
CASES = [
    *((name, 2, SMALL, {}) for name in QUANTIZERS),
    *(("per head, mapped", G, SMALL, {}) for G in (1, 4)),
    *(("per head, mapped", 2, WindowSpec(P, R), {}) for P, R in ((16, 64), (32, 96), (64, 128), (128, 256))),
    ("per head, mapped", 2, SMALL, {"first_valid": PADDED}),
    ("per head, mapped", 2, SMALL, {"softcap": 1.5}),
    ("per head, mapped", 2, SMALL, {"sinks": torch.linspace(-2, 4, HKV * 2)}),
    ("per head, mapped", 2, SMALL, {"softcap": 1.5, "sinks": torch.linspace(-2, 4, HKV * 2)}),
    ("per head, mapped", 2, SMALL, {"mask": "padded"}),
    ("blocks of two pages, no map", 2, SMALL, {"first_valid": PADDED, "softcap": 1.5}),
]


def with_mask(options: dict[str, Any], T: int) -> dict[str, Any]:
    if options.get("mask") != "padded":
        return options
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return {**options, "mask": causal & (torch.arange(T) >= PADDED.view(-1, 1, 1, 1))}


@pytest.mark.parametrize(("quantizer", "G", "window", "options"), CASES)
def test_one_quantized_pass_equals_steps_equals_the_closed_form(quantizer, G, window, options):
    T = window.residual + 3 * window.page_size + 5
    layers = random_layers(**QUANTIZERS[quantizer])
    q, k, v = random_qkv(T, G=G)
    options = dict(with_mask(options, T))
    expected = dense_attention(
        q, k, v, layers[-1], [window.coded_length(t + 1) for t in range(T)], scale=0.5, **options
    )
    one_pass, steps, chunks = [], [], []
    options["layer"] = len(layers) - 1
    for Store in STORES:
        one_pass.append(feed(Store(layers, window, prefill="quantized"), q, k, v, [T], **options))
        steps.append(feed(Store(layers, window), q, k, v, [1] * T, **options))
        chunks.append(feed(Store(layers, window, prefill="quantized"), q, k, v, [3, 1, T - 4], **options))
    for results in (one_pass, steps, chunks):
        assert torch.equal(*results)  # contiguous and paged agree bit for bit
        assert_close(results[0], expected)


@pytest.mark.parametrize("options", [{}, {"first_valid": PADDED}, {"mask": "padded"}])
@pytest.mark.parametrize("Store", STORES)
def test_exact_prefill_sees_only_earlier_codes(Store, options):
    sizes, (q, k, v), layers = [50, 1, 30, 1, 1, 70], random_qkv(153), random_layers()
    options = with_mask(options, 153)
    boundaries, start = [], 0
    for n in sizes:
        boundaries += [SMALL.coded_length(start if n > 1 else start + 1)] * n
        start += n
    store = Store(layers, SMALL)
    actual = feed(store, q, k, v, sizes, **options)
    assert_close(actual, dense_attention(q, k, v, layers[0], boundaries, scale=0.5, **options))
    assert_holds(store, k, v)


def test_first_exact_prefill_hands_the_new_tensors_on():
    _, k, v = random_qkv(100)
    view = ContiguousStore(random_layers(), SMALL).append(0, k, v)
    assert (view.coded, view.exact_start, view.length, view.num_queries) == (0, 0, 100, 100)
    assert view.keys.data_ptr() == k.data_ptr()
    assert view.values.data_ptr() == v.data_ptr()


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("rebase", [0, 32])
@pytest.mark.parametrize("Store", STORES)
def test_how_tokens_arrive_does_not_matter(Store, rebase, prefill):
    _, k, v = random_qkv(131)
    for sizes in ([131], [1] * 131, [31, 1, 1, 33, 64, 1], [16] * 8 + [3]):
        store, start = Store(random_layers(rebase=rebase), SMALL, prefill=prefill), 0
        for n in sizes:
            store.append(0, k[:, :, start : start + n], v[:, :, start : start + n])
            start += n
            assert_holds(store, k[:, :, :start], v[:, :, :start])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    q, k, v = random_qkv(90, dtype=dtype)
    layers = random_layers()
    outputs = []
    for Store in STORES:
        store = Store(layers, SMALL)
        outputs.append(feed(store, q, k, v, [1] * 90))
        assert store.exact(0)[0].dtype == dtype
        assert_holds(store, k, v)
    assert outputs[0].dtype == dtype
    assert torch.equal(*outputs)
    # The stores code in float32 here; so must the closed form, or a near tie tells them apart.
    expected = dense_attention(
        q.float(), k.float(), v.float(), layers[0], [SMALL.coded_length(t + 1) for t in range(90)], scale=0.5
    )
    assert ((outputs[0].double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


def test_layers_are_separate():
    layers = random_layers(3)
    streams = [random_qkv(80, seed=i) for i in range(3)]
    for Store in STORES:
        store = Store(layers, SMALL)
        for start in range(0, 80, 20):
            for i, (_, k, v) in enumerate(streams):
                store.append(i, k[:, :, start : start + 20], v[:, :, start : start + 20])
                assert store.length(i) == start + 20
                assert store.length(2) == start + 20 * (i == 2)
        for i, (_, k, v) in enumerate(streams):
            assert_holds(store, k, v, i)


# -- operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Store", STORES)
@pytest.mark.parametrize("rebase", [0, 16, 48])  # most crops end in an earlier block
@pytest.mark.parametrize("length", [0, 7, 31, 40, 63, 64, 99, 100, 200])
def test_crop_keeps_the_closed_form_and_the_text_goes_on(Store, length, rebase):
    layers, (_, k, v), (_, k2, v2) = random_layers(rebase=rebase), random_qkv(100), random_qkv(50, seed=1)
    store = Store(layers, SMALL)
    store.append(0, k, v)
    store.crop(length)
    k, v = cropped(k, layers[0][0], SMALL, length), cropped(v, layers[0][1], SMALL, length)
    assert_holds(store, k, v, tolerance=1e-12)
    store.append(0, k2, v2)
    assert_holds(store, torch.cat([k, k2], dim=2), torch.cat([v, v2], dim=2), tolerance=1e-12)


@pytest.mark.parametrize("Store", STORES)
def test_crop_treats_each_layer_by_its_own_length(Store):
    """As when a forward pass was interrupted between two layers."""
    store, (_, k, v) = Store(random_layers(2, map_heads=0), SMALL), random_qkv(100)
    store.append(0, k, v)
    store.append(1, k[:, :, :60], v[:, :, :60])
    store.crop(70)
    for layer, (x, y, T) in enumerate([(k, v, 100), (k[:, :, :60], v[:, :, :60], 60)]):
        keys, values = store.quantizers[layer]
        assert store.length(layer) == min(70, T)
        assert_holds(store, cropped(x, keys, SMALL, 70), cropped(y, values, SMALL, 70), layer)


@pytest.mark.parametrize("Store", STORES)
def test_batch_operations(Store):
    store, (_, k, v) = Store(random_layers(2), SMALL), random_qkv(70, B=3)
    for layer in range(2):
        store.append(layer, k, v)
    store.reorder(torch.tensor([2, 0, 2]))
    rows = [2, 0, 2]
    store.repeat_interleave(2)
    rows = [2, 2, 0, 0, 2, 2]
    assert store.batch == 6
    store.select(torch.tensor([5, 2]))
    rows = [rows[5], rows[2]]
    _, k2, v2 = random_qkv(40, B=2, seed=1)  # both go on from a shared past in different ways
    k, v = torch.cat([k[rows], k2], dim=2), torch.cat([v[rows], v2], dim=2)
    for layer in range(2):
        store.append(layer, k2, v2)
        assert_holds(store, k, v, layer)


@pytest.mark.parametrize("Store", STORES)
def test_operations_before_the_first_append_do_nothing(Store):
    store = Store(random_layers(), SMALL)
    store.repeat_interleave(3)
    store.reorder(torch.tensor([1, 0]))
    store.crop(5)
    store.reset()
    assert (store.batch, store.length(), store.memory()["total"]) == (None, 0, 0)


@pytest.mark.parametrize("Store", STORES)
def test_reset_forgets_all_and_takes_another_batch(Store):
    store, (_, k, v) = Store(random_layers(), SMALL), random_qkv(70, B=3)
    store.append(0, k, v)
    store.reset()
    assert (store.length(), store.memory()["total"]) == (0, 0)
    _, k, v = random_qkv(50, B=1, dtype=torch.float32)
    store.append(0, k, v)
    assert_holds(store, k, v)


@pytest.mark.parametrize("Store", STORES)
def test_another_batch_is_refused(Store):
    store, (_, k, v) = Store(random_layers(), SMALL), random_qkv(10, B=3)
    store.append(0, k, v)
    with pytest.raises(UserError, match=r"^batch=2: this cache holds a batch of 3; reset it first$"):
        store.append(0, k[:2], v[:2])
    assert_holds(store, k, v)


def test_bad_options_are_refused():
    with pytest.raises(UserError, match=r"^prefill='fast': accepted are exact, quantized$"):
        ContiguousStore(random_layers(), SMALL, prefill="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^max_pages=0: accepted are positive integers$"):
        PagedStore(random_layers(), SMALL, max_pages=0)


# -- pages ---------------------------------------------------------------------------------------------------


def test_one_page_id_serves_all_layers_and_heads():
    store, (_, k, v) = PagedStore(random_layers(3), SMALL), random_qkv(80)
    for layer in range(3):
        store.append(layer, k, v)
        assert store.page_stats.in_use == 2 * 4  # B sequences of coded_length(80) / P pages
    assert sorted(store.block_table()[:, :4].flatten().tolist()) == list(range(8))


def test_beams_share_pages_until_they_part():
    store, (_, k, v) = PagedStore(random_layers(), SMALL), random_qkv(64, B=1)
    store.append(0, k, v)
    before = store.memory()
    store.repeat_interleave(4)
    after = store.memory()
    assert store.page_stats.in_use == 3
    assert (after["key_codes"], after["value_codes"]) == (before["key_codes"], before["value_codes"])
    _, k2, v2 = random_qkv(16, B=4)
    store.append(0, k2, v2)
    assert store.page_stats.in_use == 3 + 4
    store.reorder(torch.tensor([1, 1, 1, 1]))
    assert store.page_stats.in_use == 3 + 1
    store.crop(0)
    assert store.page_stats.in_use == 0
    assert store.page_stats.allocations == store.page_stats.frees == 7


def test_device_copies_of_the_block_table_are_refreshed_in_place():
    store, (_, k, v) = PagedStore(random_layers(), SMALL), random_qkv(64)
    store.append(0, k, v)
    meta = torch.device("meta")
    assert store.block_table(meta) is store.block_table(meta)
    copy = store._mirrors[meta] = torch.zeros_like(store.block_table())  # stands in for memory of a device

    def append():
        store.append(0, k, v)

    for change in (append, lambda: store.reorder(torch.tensor([1, 0])), lambda: store.crop(70)):
        change()
        assert store.block_table(meta) is copy
        assert torch.equal(copy, store.block_table())
    store.repeat_interleave(2)
    assert store.block_table(meta).shape == store.block_table().shape == (4, copy.shape[1])


def test_no_memory_for_a_pool_takes_no_pages(monkeypatch):
    store, (_, k, v) = PagedStore(random_layers(2), SMALL, max_pages=20), random_qkv(80)

    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(paged, "empty_pages", fail)
        with pytest.raises(torch.OutOfMemoryError):
            store.append(0, k, v)
    assert (store.length(), store.page_stats.in_use) == (0, 0)
    store.append(0, k, v)
    assert store.page_stats.in_use == 8
    assert_holds(store, k, v)


def snapshot(store: PagedStore) -> list[Any]:
    layers = [
        (store.length(i), *(c.read(0, c.length) for c in store.codes(i)), *store.exact(i))
        for i in range(store.num_layers)
    ]
    return [*layers, store.block_table().clone(), store.page_stats, store.memory()]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(("chunk", "expected"), [(1, (95, 0, 1)), (40, (80, 0, 1))])
def test_exhaustion_changes_nothing_and_the_contiguous_store_goes_on(chunk, expected):
    layers, streams = random_layers(2), [random_qkv(240, seed=i) for i in range(2)]
    twin = ContiguousStore(layers, SMALL)
    store: CodeStore = PagedStore(layers, SMALL, max_pages=9)
    exhausted_at = []
    for start in range(0, 240, chunk):
        part = slice(start, start + chunk)
        for i, (q, k, v) in enumerate(streams):
            new = k[:, :, part], v[:, :, part]
            before = snapshot(store) if isinstance(store, PagedStore) and start else None
            try:
                view = store.append(i, *new)
            except PagePoolExhausted as error:
                assert isinstance(store, PagedStore)
                assert_same(snapshot(store), before)
                exhausted_at.append((start, i, error.free))
                emptied, store = store, store.to_contiguous()
                assert (emptied.memory()["total"], emptied.page_stats.in_use) == (0, 0)
                view = store.append(i, *new)
            other = attend(q[:, :, part], twin.append(i, *new), scale=0.5)
            assert torch.equal(attend(q[:, :, part], view, scale=0.5), other)
    # Nine pages hold four of each sequence; both need a fifth at 96 tokens, and the first layer finds out.
    assert exhausted_at == [expected]


def test_conversion_between_two_layers_of_a_forward_pass():
    layers, (q, k, v) = random_layers(2), random_qkv(100)
    paged, twin = (
        PagedStore(layers, SMALL, prefill="quantized"),
        ContiguousStore(layers, SMALL, prefill="quantized"),
    )
    for store in (paged, twin):
        store.append(0, k[:, :, :70], v[:, :, :70])
    contiguous = paged.to_contiguous()
    assert contiguous.prefill == "quantized"
    for layer, sizes in ((1, [70, 30]), (0, [30])):
        first = contiguous.length(layer)
        rest = [x[:, :, first:] for x in (q, k, v)]
        assert torch.equal(*(feed(store, *rest, sizes, layer) for store in (contiguous, twin)))
        assert_holds(contiguous, k, v, layer)


def test_a_pool_of_the_right_size_is_enough():
    _, k, v = random_qkv(100, B=3)
    store = PagedStore(random_layers(2), SMALL, max_pages=3 * SMALL.coded_length(100) // 16)
    for layer in range(2):
        store.append(layer, k, v)
    assert store.page_stats.free == 0
    store.crop(20)
    for layer in range(2):
        store.append(layer, k[:, :, 20:], v[:, :, 20:])
    assert store.page_stats.high_water == store.page_stats.total


# -- bytes ---------------------------------------------------------------------------------------------------


def tensors_in(item: Any) -> list[Tensor]:
    """All tensors reachable from a store, codebooks left out."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, LayerPQ):
        return []
    if isinstance(item, dict):
        item = list(item.values())
    elif hasattr(item, "__dict__"):
        item = list(vars(item).values())
    return [t for part in item for t in tensors_in(part)] if isinstance(item, (list, tuple)) else []


@pytest.mark.parametrize("Store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_bytes_of_the_tensors(Store, dtype):
    B, L, T = 3, 2, 150
    store = Store(random_layers(L, values=(4, 6)), SMALL)
    for _ in range(0, T, 50):
        for layer in range(L):
            _, k, v = random_qkv(50, B=B, dtype=dtype)
            store.append(layer, k, v)
        memory = store.memory()
        assert memory["total"] == sum(t.untyped_storage().nbytes() for t in tensors_in(store))
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    vectors = B * HKV * SMALL.coded_length(T)
    assert memory["key_codes"] == vectors * (4 * 4 + 4 * 6) / 8  # the layers' codes are swapped
    assert memory["value_codes"] == vectors * (4 * 6 + 4 * 4) / 8
    assert memory["window"] == 2 * L * B * HKV * SMALL.residual * D * dtype.itemsize
    assert memory["pool_reserved"] <= 0.3 * (memory["key_codes"] + memory["value_codes"])
    assert store.bits == (4 * 4 + 4 * 6) / D / 2


def test_bytes_reserved_ahead_are_stated():
    _, k, v = random_qkv(60)
    layers = random_layers(values=(4, 6))
    contiguous = ContiguousStore(layers, SMALL, max_length=500)
    paged = PagedStore(layers, SMALL, max_pages=50)
    stores: list[tuple[CodeStore, int]] = [(contiguous, 2 * SMALL.coded_length(500)), (paged, 50 * 16)]
    for store, tokens in stores:
        store.append(0, k, v)
        memory = store.memory()
        codes = memory["key_codes"] + memory["value_codes"]
        assert codes + memory["pool_reserved"] == tokens * HKV * (2 + 3)


@pytest.mark.parametrize("Store", STORES)
def test_growth_is_amortised(Store):
    """A token at a time, buffers move a logarithmic number of times and keep what they held."""
    store, (_, k, v) = Store(random_layers(map_heads=0), SMALL), random_qkv(1200, B=1)
    moves, address = 0, None
    for t in range(1200):
        view = store.append(0, k[:, :, t : t + 1], v[:, :, t : t + 1])
        codes = view.key_codes
        now = (codes.packed if Store is ContiguousStore else codes.pool).data_ptr()
        moves += now != address
        address = now
    assert_holds(store, k, v)
    assert moves <= 32  # of 74 pages
    memory = store.memory()
    assert memory["pool_reserved"] <= 0.25 * (memory["key_codes"] + memory["value_codes"])


def test_reserved_buffers_never_move():
    store, (_, k, v) = ContiguousStore(random_layers(), SMALL, max_length=300), random_qkv(300)
    addresses = set()
    for t in range(0, 300, 20):
        view = store.append(0, k[:, :, t : t + 20], v[:, :, t : t + 20])
        addresses.add(view.key_codes.packed.data_ptr())
    assert len(addresses) == 1


BRANCHES = {
    "repeat_interleave": (lambda store: store.repeat_interleave(2), [0, 0, 1, 1]),
    "reorder": (lambda store: store.reorder(torch.tensor([1, 1])), [1, 1]),
    "select": (lambda store: store.select(torch.tensor([1, 0, 1])), [1, 0, 1]),
}


@pytest.mark.parametrize("Store", STORES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_copies_of_a_sequence_write_into_pages_of_their_own(Store, branch):
    """Room is made ahead, then the batch branches: the copies go on differently."""
    layers, (_, k, v) = random_layers(2), random_qkv(70, B=2)
    store = Store(layers, SMALL)
    for layer in range(2):
        store.append(layer, k, v)
    store.reserve(70 + 120)
    change, rows = BRANCHES[branch]
    change(store)
    _, new_k, new_v = random_qkv(120, B=len(rows), seed=1)
    for t in range(120):
        for layer in range(2):
            store.append(layer, new_k[:, :, t : t + 1], new_v[:, :, t : t + 1])
    for layer in range(2):
        k_all, v_all = torch.cat([k[rows], new_k], 2), torch.cat([v[rows], new_v], 2)
        assert_holds(store, k_all, v_all, layer)


@pytest.mark.parametrize("Store", STORES)
def test_sequences_and_lengths_that_are_not_there_are_refused(Store):
    """By a sentence, also under `python -O`: these come from users."""
    store, (_, k, v) = Store(random_layers(), SMALL), random_qkv(70, B=2)
    store.append(0, k, v)
    for use, message in (
        (lambda: store.crop(-1), r"crop\(-1\): accepted are lengths from 0"),
        (lambda: store.reorder(torch.tensor([0, 1, 1])), "reorder of 3 sequences: this cache holds 2"),
        (lambda: store.reorder(torch.tensor([0, 2])), r"sequences \[0, 2\]: this cache holds 0 to 1"),
        (lambda: store.select(torch.tensor([-1])), r"sequences \[-1\]: this cache holds 0 to 1"),
        (lambda: store.select(torch.tensor([True, False])), "accepted is a list of integers"),
        (lambda: store.select(torch.tensor([], dtype=torch.long)), "not empty"),
        (lambda: store.repeat_interleave(0), r"repeat_interleave\(0\): accepted are integers from 1"),
    ):
        with pytest.raises(UserError, match=message):
            use()
    assert_holds(store, k, v)
