"""Caches under no_grad, inference_mode and mixtures of them, and where gradients would be lost."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from device_ops import DeviceOps
from tiny_models import WINDOW, codebook_for, forward, random_ids, tiny_model

from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.select import Kernels

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
KERNELS = {"compute": "kernel", "kernels": Kernels(lambda query: None, DeviceOps)}


def make(kind: str):
    cls = PagedPQCache if kind.startswith("paged") else DynamicPQCache
    return cls(tiny_model(), codebook_for(), WINDOW, **(KERNELS if "kernel" in kind else {}))


@pytest.mark.parametrize("kind", ["paged", "contiguous", "paged kernel", "contiguous kernel"])
@pytest.mark.parametrize("modes", list(product(MODES, repeat=3)), ids="-".join)
def test_any_mixture_of_modes_gives_the_same(kind, modes):
    """Prefill, changes of the batch and steps, then the next text, each in a mode of its own."""
    ids = random_ids(2, 90)
    logits = []
    for used in (modes, ("no_grad",) * 3):
        cache, out = make(kind), []
        first, second, third = (MODES[mode] for mode in used)
        with first():
            out.append(tiny_model()(ids[:, :60], past_key_values=cache).logits)
        with second():
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.crop(-20)
            for t in range(40, 90):
                out.append(tiny_model()(ids[:, t : t + 1], past_key_values=cache).logits)
            cache.batch_repeat_interleave(2)
        with third():
            cache.batch_select_indices(torch.tensor([0, 3]))
            out.append(tiny_model()(ids[:, :50], past_key_values=cache).logits)
            cache.reset(release=False)
        out.append(forward(tiny_model(), cache, ids))
        cache.reset()
        logits.append(torch.cat([x.reshape(-1) for x in out]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["paged kernel", "dense"])
@pytest.mark.parametrize("modes", list(product(MODES, [*MODES, "none"])), ids="-".join)
def test_an_engine_is_used_in_any_mode(kind, modes):
    first, second = ({**MODES, "none": nullcontext}[mode] for mode in modes)
    ids = random_ids(2, 50)
    make_cache = (lambda: DenseCache(tiny_model(), 300)) if kind == "dense" else lambda: make(kind)
    engine, plain = (Engine(tiny_model(), make_cache(), graphs=None) for _ in range(2))
    with first():
        tokens = [engine.prefill(ids).tolist()]
    with second():
        tokens += [engine.step().tolist() for _ in range(40)]
    assert tokens == list(plain.generate(ids, max_new_tokens=41))
    with second():
        engine.reset()
    assert tokens == list(engine.generate(ids, max_new_tokens=41))


@pytest.mark.parametrize("kind", ["paged", "contiguous", "paged kernel"])
def test_gradients_through_codes_are_refused(kind):
    cache, ids = make(kind), random_ids(1, 60)
    with pytest.raises(UserError, match=r"carries no gradients: call the model under torch\.no_grad"):
        tiny_model()(ids, past_key_values=cache)
    forward(tiny_model(), cache, ids)
    embeddings = tiny_model().get_input_embeddings()(ids).detach().requires_grad_(True)
    with pytest.raises(UserError, match="carries no gradients"):
        tiny_model()(inputs_embeds=embeddings, past_key_values=cache)


def test_what_needs_no_gradients_needs_no_mode():
    cache, model = make("paged"), tiny_model(seed=3).requires_grad_(False)
    keys = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    cache.append(0, keys, keys)  # gradients are enabled, but nothing asks for them
    assert cache.store.length() == 40
    assert not any(p.requires_grad for p in model.parameters())


def test_shapes_that_the_codebook_is_not_for_are_refused():
    cache, keys = make("paged"), torch.randn(1, 2, 5, 16, dtype=torch.float64)
    cache.append(0, keys, keys)
    with pytest.raises(UserError, match=r"\(KV heads, head_dim\)=\(2, 8\): the codebook is for \(2, 16\)"):
        cache.append(1, keys, keys[..., :8])
    with pytest.raises(UserError, match="no tokens"):
        cache.append(1, keys[:, :, :0], keys[:, :, :0])
    with pytest.raises(UserError, match="every layer has been appended to"):
        cache.reserve(100)
