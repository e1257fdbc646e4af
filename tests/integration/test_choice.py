"""The choice of store and compute, and what happens when it has to be revised at run time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WINDOW, codebook_for, forward, random_ids, tiny_model

from million_cli.cache.paged import PagedStore
from million_cli.cache.view import attend
from million_cli.errors import UserError
from million_cli.integration import select
from million_cli.integration.cache import DynamicPQCache, PagedPQCache
from million_cli.integration.select import Choice, Fallback, KernelQuery, Kernels, Request, choose, no_kernels
from million_cli.spec import CodeSpec, PQSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def query(device: torch.device = GPU) -> KernelQuery:
    side = CodeSpec(128, 64, 8)
    return KernelQuery("paged", device, torch.float16, PQSpec(side, side), WINDOW, 8, 4)


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
    asked = choose(Request("contiguous", "kernel"), query(CPU), no_kernels)
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
    monkeypatch.setattr(PagedStore, "_grow_pool", no_memory)
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

    monkeypatch.setattr(PagedStore, "_grow_pool", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        tokens(PagedPQCache(tiny_model(), codebook_for(), WINDOW))


class CountingKernel:
    """Stands for a compiled kernel: the definition itself, until it has been called `good` times."""

    def __init__(self, good: int) -> None:
        self.good, self.calls = good, 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.good:
            raise RuntimeError("illegal instruction\nsecond line")
        return attend(*args, **kwargs)


def test_kernel_serves_and_a_failing_one_is_replaced() -> None:
    expected = tokens(DynamicPQCache(tiny_model(), codebook_for(), WINDOW))
    for good in (10_000, 7):
        kernel = CountingKernel(good)
        cache = PagedPQCache(
            tiny_model(), codebook_for(), WINDOW, compute="kernel", kernels=Kernels(lambda q: None, kernel)
        )
        assert str(cache.backend) == "paged kernel"
        assert tokens(cache) == expected
        if good == 7:
            assert kernel.calls == 8, "not tried again after its failure"
            assert cache.fallbacks == (
                Fallback("paged kernel", "paged torch", "the kernel failed: illegal instruction"),
            )
        else:
            assert kernel.calls > 39
            assert cache.fallbacks == ()


def test_exhausted_pool_keeps_the_kernel_only_if_it_serves_contiguous_stores() -> None:
    for stores, got in ((("paged", "contiguous"), "contiguous kernel"), (("paged",), "contiguous torch")):
        kernels = Kernels(supporting(*stores), CountingKernel(10_000))
        cache = PagedPQCache(
            tiny_model(), codebook_for(), WINDOW, max_pages=3, compute="kernel", kernels=kernels
        )
        tokens(cache)
        assert str(cache.backend) == got


def test_strict_kernel_on_a_cpu_is_refused_when_the_cache_is_made() -> None:
    with pytest.raises(UserError, match="no compiled kernels for device cpu"):
        DynamicPQCache(tiny_model(), codebook_for(), WINDOW, compute="kernel", strict=True)


def test_cache_from_a_configuration_decides_at_the_first_append() -> None:
    model = tiny_model()
    expected = forward(model, DynamicPQCache(model, codebook_for(), WINDOW), random_ids(1, 50))
    cache = DynamicPQCache(model.config, codebook_for(), WINDOW)
    torch.testing.assert_close(forward(model, cache, random_ids(1, 50)), expected)
