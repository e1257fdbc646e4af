"""The choice of store and compute, and its fallbacks at run time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WINDOW, codebook_for, forward, random_ids, tiny_model
from torch_ops import TorchOps

from million_cli.cache import paged
from million_cli.errors import UserError
from million_cli.hf import select
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.select import Choice, Fallback, Kernels, Request, choose
from million_cli.ops.support import KernelQuery, support
from million_cli.spec import CodeSpec, PQSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def query(device: torch.device = GPU) -> KernelQuery:
    side = CodeSpec(128, 64, 8)
    return KernelQuery("paged", device, torch.float16, (PQSpec(side, side),), WINDOW, 8, 4)


def supporting(*stores: str) -> Any:
    return lambda q: None if q.store in stores else f"no {q.store} kernel for head_dim 128"


# -- the pure function ---------------------------------------------------------------------------------------


def test_best_first() -> None:
    assert choose(Request("paged"), query(), supporting("paged", "contiguous")) == Choice("paged", "kernel")
    assert choose(Request("contiguous"), query(), supporting("paged", "contiguous")) == Choice(
        "contiguous", "kernel"
    )


def test_contiguous_kernel_before_paged_torch() -> None:
    choice = choose(Request("paged"), query(), supporting("contiguous"))
    reason = "no paged kernel for head_dim 128"
    assert choice == Choice("contiguous", "kernel", (Fallback("paged kernel", "contiguous kernel", reason),))


def test_torch_last_keeps_the_store_and_names_each_reason() -> None:
    choice = choose(Request("paged"), query(), supporting())
    assert (choice.store, choice.compute) == ("paged", "torch")
    assert [(f.wanted, f.got) for f in choice.fallbacks] == [
        ("paged kernel", "paged torch"),
        ("contiguous kernel", "paged torch"),
    ]


def test_torch_on_a_cpu_is_no_fallback_unless_a_kernel_was_asked_for() -> None:
    assert choose(Request("paged"), query(CPU), supporting()) == Choice("paged", "torch")
    asked = choose(Request("contiguous", "kernel"), query(CPU), support)
    assert asked.fallbacks == (
        Fallback("contiguous kernel", "contiguous torch", "no compiled kernels for device cpu"),
    )
    assert choose(Request("paged", "torch", strict=True), query(GPU), supporting()).fallbacks == ()


requests = st.builds(
    Request,
    st.sampled_from(["paged", "contiguous"]),
    st.sampled_from(["auto", "kernel", "torch"]),
    st.booleans(),
)


@given(
    request=requests,
    device=st.sampled_from([CPU, GPU]),
    stores=st.sets(st.sampled_from(["paged", "contiguous"])),
)
def test_choice_is_served_explained_and_strict(
    request: Request, device: torch.device, stores: set[str]
) -> None:
    support = supporting(*stores)
    lenient = choose(Request(request.store, request.compute), query(device), support)
    if lenient.compute == "kernel":
        assert lenient.store in stores
        assert request.compute != "torch"
    if (lenient.store, lenient.compute) != (request.store, "kernel"):
        asked_for_torch = request.compute == "torch" or (request.compute == "auto" and device == CPU)
        assert bool(lenient.fallbacks) is not asked_for_torch
    if request.strict and lenient.fallbacks:
        with pytest.raises(UserError, match="strict run") as error:
            choose(request, query(device), support)
        assert all(f.reason in str(error.value) for f in lenient.fallbacks)
        assert "\n" not in str(error.value)
    else:
        assert choose(request, query(device), support) == lenient


@pytest.mark.parametrize("bad", [{"store": "ring"}, {"compute": "fast"}])
def test_unknown_requests(bad: dict[str, str]) -> None:
    with pytest.raises(UserError, match="accepted are"):
        Request(**bad)


# -- at run time ---------------------------------------------------------------------------------------------


def tokens(cache: Any, B: int = 2, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, **options}
    return tiny_model().generate(random_ids(B, 40), past_key_values=cache, **options).tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("max_pages", [1, 3, 5])
def test_pool_that_runs_out_changes_no_token(max_pages: int, options: dict[str, Any], caplog: Any) -> None:
    """The prompt alone wants one page a sequence, the whole text three."""
    select.log_once.cache_clear()
    expected = tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW), **options)
    with caplog.at_level(logging.WARNING, logger="million"):
        for _ in range(2):
            cache = PagedPQCache(tiny_model(), codebook_for(), WINDOW, max_pages=max_pages)
            assert (cache.backend.store, cache.fallbacks) == ("paged", ())
            assert tokens(cache, **options) == expected
            (fallback,) = cache.fallbacks
            assert (fallback.wanted, fallback.got) == ("paged torch", "contiguous torch")
            assert f"of {max_pages} pages" in fallback.reason
            assert cache.backend == Choice("contiguous", "torch", (fallback,))
    assert len(set(caplog.messages)) == len(caplog.messages) > 0, "each reason is logged once"


def test_reset_gives_the_pool_another_chance() -> None:
    cache = PagedPQCache(tiny_model(), codebook_for(), WINDOW, max_pages=3)
    first = tokens(cache)
    cache.reset()
    assert (cache.backend.store, len(cache.fallbacks)) == ("paged", 1)
    assert tokens(cache) == first
    assert len(cache.fallbacks) == 1, "the same fallback again is not told again"


def test_strict_run_stops_when_the_pool_runs_out() -> None:
    cache = PagedPQCache(tiny_model(), codebook_for(), WINDOW, max_pages=3, strict=True)
    with pytest.raises(UserError, match=r"strict run: paged torch -> contiguous torch: .* of 3 pages"):
        tokens(cache)


def test_pool_that_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW))
    monkeypatch.setattr(paged, "empty_pages", no_memory)
    cache = PagedPQCache(tiny_model(), codebook_for(), WINDOW, max_pages=1000)
    assert tokens(cache) == expected
    assert cache.fallbacks == (
        Fallback("paged torch", "contiguous torch", "no memory for a pool of 1000 pages"),
    )
    with pytest.raises(UserError, match="no memory for a pool"):
        tokens(PagedPQCache(tiny_model(), codebook_for(), WINDOW, max_pages=1000, strict=True))


def test_other_runtime_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(paged, "empty_pages", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        tokens(PagedPQCache(tiny_model(), codebook_for(), WINDOW))


def torch_kernels(
    good: int | None = None, stores: tuple[str, ...] = ("paged", "contiguous")
) -> tuple[Kernels, list[TorchOps]]:
    """Kernels that are their own definition in torch, serve `stores` and fail after `good` calls each."""
    made: list[TorchOps] = []

    def make(store: Any) -> TorchOps:
        made.append(TorchOps(store, good))
        return made[-1]

    return Kernels(supporting(*stores), make), made


def by_kernel(store: str, kernels: Kernels, **options: Any) -> Any:
    cache_class = PagedPQCache if store == "paged" else DynamicPQCache
    return cache_class(tiny_model(), codebook_for(), WINDOW, compute="kernel", kernels=kernels, **options)


def paged_by_kernel(kernels: Kernels, **options: Any) -> Any:
    return by_kernel("paged", kernels, **options)


both_stores = pytest.mark.parametrize("store", ["paged", "contiguous"])


@both_stores
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 23}])
def test_kernel_serves_every_decode_step(options: dict[str, Any], store: str) -> None:
    expected = tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW), **options)
    kernels, made = torch_kernels()
    cache = by_kernel(store, kernels)
    assert str(cache.backend) == f"{store} kernel"
    assert tokens(cache, **options) == expected
    assert cache.fallbacks == ()
    (ops,) = made
    assert ops.calls["append"] == ops.calls["attend"] == 2 * 39  # layers by steps
    assert ops.calls["encode"] > 0


@both_stores
@pytest.mark.parametrize("good", [0, 1, 2, 3, 7, 30])
def test_failing_kernel_is_replaced_by_torch_over_the_same_codes(good: int, store: str) -> None:
    expected = tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW))
    kernels, made = torch_kernels(good)
    cache = by_kernel(store, kernels)
    assert tokens(cache) == expected
    assert cache.fallbacks == (
        Fallback(f"{store} kernel", f"{store} torch", "the kernel failed: illegal instruction"),
    )
    assert str(cache.backend) == f"{store} torch"
    (ops,) = made
    assert ops.calls.total() == good + 1, "not tried again after its failure"
    cache.reset()
    assert str(cache.backend) == f"{store} kernel"
    with pytest.raises(UserError, match=f"strict run: {store} kernel -> {store} torch: the kernel failed"):
        tokens(by_kernel(store, kernels, strict=True))


@pytest.mark.parametrize(
    ("stores", "got"),
    [(("paged", "contiguous"), "contiguous kernel"), (("paged",), "contiguous torch")],
)
def test_exhausted_pool_keeps_the_kernel_if_there_is_a_contiguous_one(
    stores: tuple[str, ...], got: str
) -> None:
    expected = tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW))
    kernels, made = torch_kernels(stores=stores)
    cache = paged_by_kernel(kernels, max_pages=3)
    assert tokens(cache) == expected
    assert str(cache.backend) == got
    assert [str(f).split(":")[0] for f in cache.fallbacks] == [f"paged kernel -> {got}"]
    assert all(ops.calls["attend"] > 0 for ops in made)
    assert len(made) == len(stores)


# -- padding -------------------------------------------------------------------------------------------------


def padded_tokens(cache: Any, mask: torch.Tensor) -> list[list[int]]:
    ids = random_ids(*mask.shape).masked_fill(mask == 0, 0)
    return (
        tiny_model()
        .generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
        )
        .tolist()
    )


@pytest.mark.parametrize("lengths", [[40, 40], [40, 23], [1, 40]])
def test_left_padding_reaches_the_kernel_as_first_positions(lengths: list[int]) -> None:
    mask = (torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]).long()
    expected = padded_tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW), mask)
    kernels, made = torch_kernels()
    cache = paged_by_kernel(kernels, strict=True)
    assert padded_tokens(cache, mask) == expected
    (ops,) = made
    assert ops.calls["attend"] == len(ops.first_valid) == 2 * 29
    if lengths == [40, 40]:
        assert set(ops.first_valid) == {None}
    else:
        assert len({id(first) for first in ops.first_valid}) == 1, "one tensor for all steps"
        assert ops.first_valid[0].tolist() == [40 - n for n in lengths]
        assert ops.first_valid[0].dtype == torch.int32


def test_padding_with_holes_is_left_to_torch_and_said_so() -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 10:13] = 0
    expected = padded_tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW), mask)
    kernels, made = torch_kernels()
    cache = paged_by_kernel(kernels)
    assert padded_tokens(cache, mask) == expected
    assert cache.fallbacks == (Fallback("paged kernel", "paged torch", "an attention mask with holes"),)
    assert made[0].calls["attend"] == 0
    assert str(cache.backend) == "paged kernel", "the next text may have no holes"
    with pytest.raises(UserError, match=r"strict run: .* an attention mask with holes"):
        padded_tokens(paged_by_kernel(kernels, strict=True), mask)


def test_prepared_masks_are_left_to_torch() -> None:
    model, ids, (kernels, made) = tiny_model(), random_ids(1, 50), torch_kernels()
    mask = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    mask[..., 7] = False
    logits = []
    for cache in (DynamicPQCache(model, codebook_for(), WINDOW), paged_by_kernel(kernels)):
        forward(model, cache, ids[:, :49])
        logits.append(forward(model, cache, ids[:, 49:], mask))
    assert torch.equal(*logits)
    assert made[0].calls["attend"] == 0
    assert "not made from padding alone" in cache.fallbacks[0].reason


def test_padding_is_looked_at_again_after_the_batch_was_changed() -> None:
    model, (kernels, made) = tiny_model(), torch_kernels()
    padding = torch.tensor([0, 9, 20])
    mask = (torch.arange(60) >= padding[:, None]).long()
    ids = random_ids(3, 60)
    logits = []
    for cache in (DynamicPQCache(model, codebook_for(), WINDOW), paged_by_kernel(kernels, strict=True)):
        steps = [forward(model, cache, ids[:, :50], mask[:, :50])]
        rows, T = torch.arange(3), 50
        for change in ("none", "reorder", "select", "repeat", "crop", "none"):
            if change == "reorder":
                rows = rows[[2, 0, 0]]
                cache.reorder_cache(torch.tensor([2, 0, 0]))
            elif change == "select":
                rows = rows[[0, 1]]
                cache.batch_select_indices(torch.tensor([0, 1]))
            elif change == "repeat":
                rows = rows.repeat_interleave(2)
                cache.batch_repeat_interleave(2)
            elif change == "crop":
                cache.crop(-2)
                T -= 2
            T += 1
            steps.append(forward(model, cache, ids[rows, T - 1 : T], mask[rows, :T]))
        logits.append(steps)
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))
    seen = [first.tolist() for first in made[0].first_valid[::2]]
    assert seen == [[0, 9, 20], [20, 0, 0], [20, 0], [20, 20, 0, 0], [20, 20, 0, 0], [20, 20, 0, 0]]


def test_padding_that_grows_is_followed_token_by_token() -> None:
    """A batch fed one token at a time: the second sequence starts late."""
    model, ids, (kernels, made) = tiny_model(), random_ids(2, 8), torch_kernels()
    mask = (torch.arange(8) >= torch.tensor([[0], [3]])).long()
    cache = paged_by_kernel(kernels, strict=True)
    for t in range(8):
        forward(model, cache, ids[:, t : t + 1], mask[:, : t + 1])
    seen = [first.tolist() for first in made[0].first_valid[::2]]
    assert seen == [[0, 1], [0, 2], [0, 3], *[[0, 3]] * 5]


def test_strict_kernel_on_a_cpu_is_refused_when_the_cache_is_made() -> None:
    with pytest.raises(UserError, match="no compiled kernels for device cpu"):
        DynamicPQCache(tiny_model(), codebook_for(), WINDOW, compute="kernel", strict=True)


def test_cache_from_a_configuration_decides_at_the_first_append() -> None:
    model = tiny_model()
    expected = forward(model, DynamicPQCache(model, codebook_for(), WINDOW), random_ids(1, 50))
    cache = DynamicPQCache(model.config, codebook_for(), WINDOW)
    torch.testing.assert_close(forward(model, cache, random_ids(1, 50)), expected)
