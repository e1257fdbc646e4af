"""Recording K and V through the integration, and a run that is killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache

from million_cli import files
from million_cli.calibration.samples import Samples
from million_cli.calibration.sampling import SamplingCache, read_text
from million_cli.errors import UserError
from million_cli.hf.switch import ATTENTION_NAME


def read(cache: SamplingCache, architecture: str, contexts: range, chunk_tokens: int = 2048) -> None:
    for context in contexts:
        read_text(tiny_model(architecture), cache, random_ids(1, 40, seed=context), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
def test_all_tokens_kept_are_the_models_keys_and_values(architecture: str) -> None:
    model = tiny_model(architecture)
    model.set_attn_implementation(ATTENTION_NAME)  # gemma2 has a softcap, which sdpa lacks
    sampling = SamplingCache(model, samples=200)
    read(sampling, architecture, range(3))
    keys, values = sampling.samples()
    dense = []
    for context in range(3):
        cache = DynamicCache(config=model.config)
        read_text(model, cache, random_ids(1, 40, seed=context))
        dense.append(cache)
    for row, index in enumerate(sampling.fingerprint.layers):
        expected = torch.cat([cache.layers[index].keys[0] for cache in dense], dim=1)
        torch.testing.assert_close(keys[row], expected, rtol=0, atol=1e-12)
        expected = torch.cat([cache.layers[index].values[0] for cache in dense], dim=1)
        torch.testing.assert_close(values[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_chunks_do_not_change_the_sample(architecture: str) -> None:
    results = []
    for chunk in (2048, 16, 7):
        cache = SamplingCache(tiny_model(architecture), samples=25, seed=4)
        read(cache, architecture, range(4), chunk)
        assert cache.seen == 160
        results.append(cache.samples())
    for keys, values in results[1:]:
        torch.testing.assert_close(keys, results[0][0], rtol=0, atol=1e-9)
        torch.testing.assert_close(values, results[0][1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [2048, 9])
def test_padding_is_not_sampled(chunk: int) -> None:
    ids = random_ids(2, 30)
    mask = (torch.arange(30) >= torch.tensor([[12], [0]])).long()
    cache = SamplingCache(tiny_model(), samples=100)
    read_text(tiny_model(), cache, ids.masked_fill(mask == 0, 0), mask, chunk)
    keys, _ = cache.samples()
    assert cache.seen == keys.shape[2] == 18 + 30
    alone = SamplingCache(tiny_model(), samples=100)
    read_text(tiny_model(), alone, ids[:1, 12:])
    short = alone.samples()[0]
    # In reading order: twelve positions of the second row, then both rows in turn.
    torch.testing.assert_close(keys[:, :, 12::2], short, rtol=0, atol=1e-9)


def test_killed_run_resumes_to_the_same_sample(tmp_path: Path) -> None:
    straight = SamplingCache(tiny_model(), samples=30, seed=2)
    read(straight, "llama", range(6))

    first = SamplingCache(tiny_model(), samples=30, seed=2)
    assert first.resume(tmp_path) is None
    read(first, "llama", range(2))
    first.save(tmp_path, {"next": 2})
    read(first, "llama", range(2, 3))  # lost by the kill
    second = SamplingCache(tiny_model(), samples=30, seed=2)
    progress = second.resume(tmp_path)
    assert progress == {"next": 2}
    read(second, "llama", range(progress["next"], 6))
    second.save(tmp_path, {"next": 6})

    stored = Samples(tmp_path)
    for (got_keys, got_values), (keys, values) in (
        (second.samples(), straight.samples()),
        (stored.stacked(), straight.samples()),
    ):
        assert torch.equal(got_keys, keys)
        assert torch.equal(got_values, values)
    assert stored.manifest["seen"] == 240
    assert stored.fingerprint == straight.fingerprint
    assert len(list(tmp_path.iterdir())) == 3, "two shards and the manifest; nothing stale"


@pytest.mark.parametrize("fails_at", ["layer-001", "manifest"])
def test_save_that_fails_leaves_the_previous_state(
    tmp_path: Path, fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SamplingCache(tiny_model(), samples=30)
    read(cache, "llama", range(1))
    cache.save(tmp_path, {"next": 1})
    before = Samples(tmp_path).stacked()
    read(cache, "llama", range(1, 2))
    replace = files.os.replace

    def full_disk(source: Path, target: Path) -> None:
        if fails_at in Path(target).name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            cache.save(tmp_path, {"next": 2})
    resumed = SamplingCache(tiny_model(), samples=30)
    assert resumed.resume(tmp_path) == {"next": 1}
    assert all(torch.equal(a, b) for a, b in zip(resumed.samples(), before, strict=True))
    cache.save(tmp_path, {"next": 2})
    assert all(torch.equal(a, b) for a, b in zip(Samples(tmp_path).stacked(), cache.samples(), strict=True))
    assert len(list(tmp_path.iterdir())) == 3


def test_samples_of_another_run_are_refused(tmp_path: Path) -> None:
    cache = SamplingCache(tiny_model(), samples=30, seed=2)
    read(cache, "llama", range(1))
    cache.save(tmp_path)
    with pytest.raises(UserError, match=r"seed: 2 != 3"):
        SamplingCache(tiny_model(), samples=30, seed=3).resume(tmp_path)
    with pytest.raises(UserError, match=r"samples: 30 != 31"):
        SamplingCache(tiny_model(), samples=31, seed=2).resume(tmp_path)
    with pytest.raises(UserError, match="model_type: 'llama' != 'qwen3'"):
        SamplingCache(tiny_model("qwen3"), samples=30, seed=2).resume(tmp_path)


def test_missing_damaged_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples here"):
        Samples(tmp_path)
    with pytest.raises(UserError, match="no token was read"):
        SamplingCache(tiny_model(), samples=3).save(tmp_path)
    cache = SamplingCache(tiny_model(), samples=30)
    read(cache, "llama", range(1))
    cache.save(tmp_path)
    shard = next(tmp_path.glob("layer-001*"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match=shard.name):
        Samples(tmp_path).stacked()
    (tmp_path / "manifest.json").write_text("{]")
    with pytest.raises(UserError, match=r"manifest\.json"):
        Samples(tmp_path)


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="samples=0"):
        SamplingCache(tiny_model(), samples=0)
    with pytest.raises(UserError, match="seed=-1"):
        SamplingCache(tiny_model(), samples=1, seed=-1)


def test_nan_names_the_layer(tmp_path: Path) -> None:
    cache = SamplingCache(tiny_model(), samples=30)
    keys = torch.zeros(1, 2, 3, 16)
    cache.update(keys, keys, 0)
    with pytest.raises(UserError, match="layer 1"):
        cache.update(keys, keys / 0, 1)
