"""Copied, pickled and saved caches continue as their originals do."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from device_ops import DeviceOps
from random_codebook import random_codebook
from safetensors.torch import load_file, save_file
from tiny_models import WINDOW, codebook_for, forward, new_model, random_ids, tiny_model

from million_cli.errors import UserError
from million_cli.files import read_safetensors
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.select import Kernels
from million_cli.hf.static import StaticPQCache


def no_reason(query):
    return None


KERNELS = {"compute": "kernel", "kernels": Kernels(no_reason, DeviceOps)}
KINDS = ["paged", "contiguous", "paged kernel", "static"]


def make(kind: str, architecture: str = "llama"):
    options = KERNELS if kind in ("paged kernel", "static") else {}
    if kind == "static":
        options = {**options, "max_length": 200}
    cls = {"contiguous": DynamicPQCache, "static": StaticPQCache}.get(kind, PagedPQCache)
    return cls(tiny_model(architecture), codebook_for(architecture), WINDOW, **options)


def logits_of_the_rest(cache, ids, architecture: str = "llama"):
    model = tiny_model(architecture)
    return torch.cat([forward(model, cache, part) for part in ids.split(1, 1)], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_itself(kind, duplicate):
    cache, ids, other_ids = make(kind), random_ids(2, 150), random_ids(2, 150, seed=1)
    forward(tiny_model(), cache, ids[:, :100])
    other = duplicate(cache)
    logits_of_the_rest(other, other_ids[:, 100:])  # writes into its own tensors
    ours = logits_of_the_rest(cache, ids[:, 100:])
    fresh = make("paged")
    forward(tiny_model(), fresh, ids[:, :100])
    torch.testing.assert_close(ours, logits_of_the_rest(fresh, ids[:, 100:]), rtol=0, atol=1e-11)
    assert int(other.get_seq_length()) == int(cache.get_seq_length()) == 150
    assert str(other.backend) == str(cache.backend)


def test_a_deep_copy_shares_the_codebook():
    cache = make("paged")
    forward(tiny_model(), cache, random_ids(1, 60))
    other = copy.deepcopy(cache)
    assert other.codebook is cache.codebook
    assert other.store.quantizers[0][0] is cache.store.quantizers[0][0]
    assert other.store is not cache.store
    assert other.layers[0]._cache is other


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("written_by", KINDS)
@pytest.mark.parametrize("read_by", [PagedPQCache, DynamicPQCache])
def test_a_saved_text_goes_on_in_any_cache(tmp_path, architecture, written_by, read_by):
    if architecture == "gemma2" and written_by in ("static", "paged kernel"):
        pytest.skip("its softcap has no kernel, as these stand-ins would")
    model, ids = tiny_model(architecture), random_ids(2, 150)
    cache = make(written_by, architecture)
    forward(model, cache, ids[:, :100])
    cache.save(tmp_path / "prompt.safetensors")
    again = read_by.load(tmp_path / "prompt.safetensors", model, codebook_for(architecture))
    assert again.get_seq_length() == 100
    expected = logits_of_the_rest(cache, ids[:, 100:], architecture)
    ours = logits_of_the_rest(again, ids[:, 100:], architecture)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_the_file_holds_codes_and_window_alone(tmp_path):
    cache, path = make("paged"), tmp_path / "prompt.safetensors"
    forward(tiny_model(), cache, random_ids(2, 100))
    cache.save(path)
    coded, exact = WINDOW.coded_length(100), 100 - WINDOW.coded_length(100)
    row_bytes = codebook_for().specs[0].keys.row_bytes + codebook_for().specs[0].values.row_bytes
    expected = 2 * 2 * 2 * (coded * row_bytes + exact * 2 * 16 * 8)  # layers, sequences, heads; float64
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == expected
    assert path.stat().st_size < expected + 4096
    cache.save(tmp_path / "again.safetensors")
    assert sorted(load_file(path)) == sorted(load_file(tmp_path / "again.safetensors"))


def test_a_pool_too_small_for_a_saved_text_goes_on_contiguously(tmp_path):
    cache, ids = make("paged"), random_ids(1, 150)
    forward(tiny_model(), cache, ids[:, :100])
    cache.save(tmp_path / "prompt.safetensors")
    again = PagedPQCache.load(tmp_path / "prompt.safetensors", tiny_model(), codebook_for(), max_pages=2)
    assert "page pool exhausted" in str(again.fallbacks[0])
    expected = logits_of_the_rest(cache, ids[:, 100:])
    torch.testing.assert_close(logits_of_the_rest(again, ids[:, 100:]), expected, rtol=0, atol=1e-11)
    with pytest.raises(UserError, match="page pool exhausted"):
        PagedPQCache.load(
            tmp_path / "prompt.safetensors", tiny_model(), codebook_for(), max_pages=2, strict=True
        )


def test_files_that_do_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "prompt.safetensors", tiny_model()
    with pytest.raises(UserError, match="accepted is one that holds a text"):
        make("paged").save(path)
    cache = make("paged")
    forward(model, cache, random_ids(1, 100))
    cache.save(path)
    with pytest.raises(UserError, match="another codebook"):
        PagedPQCache.load(path, model, random_codebook(model, (4, 5), (4, 8)))
    with pytest.raises(UserError, match=r"holds torch.float64, the model is of torch.float32"):
        PagedPQCache.load(path, new_model().float(), codebook_for())
    with pytest.raises(UserError, match="no such file"):
        PagedPQCache.load(tmp_path / "none", model, codebook_for())
    codebook_for().save(tmp_path / "codebook.safetensors")
    with pytest.raises(UserError, match="is not a cache"):
        PagedPQCache.load(tmp_path / "codebook.safetensors", model, codebook_for())


DAMAGES = {
    "a tensor less": lambda tensors, card: tensors.pop("0.values.codes"),
    "a tensor by another name": lambda tensors, card: tensors.update(x=tensors.pop("own.0.keys")),
    "fewer tokens": lambda tensors, card: tensors.update(
        {"0.keys.codes": tensors["0.keys.codes"][:, :, :16]}
    ),
    "another batch": lambda tensors, card: tensors.update({"0.values.exact": tensors["0.values.exact"][:1]}),
    "another dtype": lambda tensors, card: tensors.update({"own.0.keys": tensors["own.0.keys"].long()}),
    "NaN": lambda tensors, card: tensors["own.0.values"].fill_(torch.nan),
    "one bit": lambda tensors, card: tensors["0.keys.codes"][0, 0, 0].bitwise_xor_(1),
    "another length": lambda tensors, card: card.update(length=64),
    "no list of layers": lambda tensors, card: card.update(own=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage):
    model, path = tiny_model("gemma3_text"), tmp_path / "prompt.safetensors"
    codebook = codebook_for("gemma3_text")
    cache = PagedPQCache(model, codebook, WINDOW)
    forward(model, cache, random_ids(2, 100))
    cache.save(path)
    tensors, metadata = read_safetensors(path)
    card = json.loads(metadata["card"])
    DAMAGES[damage](tensors, card)
    metadata["card"] = json.dumps(card, sort_keys=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    with pytest.raises(UserError, match="is damaged") as error:
        PagedPQCache.load(path, model, codebook)
    assert "\n" not in str(error.value)


def test_a_text_that_is_not_finite_is_not_written(tmp_path):
    cache = make("paged")
    keys = torch.full((1, 2, 20, 16), torch.nan, dtype=torch.float64)
    for layer in range(2):
        cache.update(keys, keys, layer)
    with pytest.raises(UserError, match="holds NaN or infinity; it is not written"):
        cache.save(tmp_path / "prompt.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_process_reads_it(tmp_path):
    path, ids = tmp_path / "prompt.safetensors", random_ids(1, 110)
    cache = make("paged")
    forward(tiny_model(), cache, ids[:, :100])
    cache.save(path)
    program = """
import sys, torch
from tiny_models import codebook_for, forward, random_ids, tiny_model
from million_cli.hf.cache import PagedPQCache
cache = PagedPQCache.load(sys.argv[1], tiny_model(), codebook_for())
print(forward(tiny_model(), cache, random_ids(1, 110)[:, 100:]).argmax(-1).tolist())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ran = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert ran.stdout.strip() == str(forward(tiny_model(), cache, ids[:, 100:]).argmax(-1).tolist())
