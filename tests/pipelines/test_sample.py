"""Sampling: found again, gone on with, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from million_cli.errors import UserError
from million_cli.integration.sampling import Samples
from million_cli.pipelines import sample as pipeline
from million_cli.pipelines.sample import run_sample, sample, sample_key
from million_cli.pipelines.session import Session


def tensors(folder):
    return torch.cat(Samples(Path(folder)).stacked())


def test_a_finished_sample_is_found_again(job, monkeypatch):
    folder = sample(Session(job()))
    monkeypatch.setattr(pipeline, "read_text", None)  # calling it would fail
    assert sample(Session(job())) == folder


def test_an_interrupted_run_goes_on_and_ends_with_the_same_sample(job, tmp_path, monkeypatch):
    config = job(f"out={tmp_path}", "sample.batch=1")
    read, calls = pipeline.read_text, []

    def failing(model, cache, ids):
        calls.append(ids[0, :8].tolist())
        if len(calls) == 4:
            raise RuntimeError("power cut")
        read(model, cache, ids)

    monkeypatch.setattr(pipeline, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(pipeline, "read_text", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        sample(Session(config))
    folder = sample(Session(config))
    assert len(calls) == 1 + 2048 // 256 + 3  # the window that failed is the only one read twice
    assert calls[3] == calls[4]
    assert torch.equal(tensors(folder), tensors(sample(Session(job("sample.batch=1")))))


@pytest.mark.parametrize(
    "override", ["seed=3", "data.seed=5", "sample.reservoir=400", "sample.tokens=1024", "model.dtype=float64"]
)
def test_the_key_follows_what_the_sample_depends_on(job, override):
    assert sample_key(Session(job(override))) != sample_key(Session(job()))


def test_the_key_ignores_what_comes_later(job):
    for override in ("quantizer=pq-2bit", "cache=paged", "train.iterations=9", "task.context=64"):
        assert sample_key(Session(job(override))) == sample_key(Session(job())), override


def test_a_text_shorter_than_a_window_is_one_window(job, tmp_path):
    config = job(f"out={tmp_path}", "data.max_chars=100")
    (result,) = run_sample(config)
    assert result.metrics["sample_tokens"] == 100 == result.metrics["samples"]
    assert tensors(result.metrics["samples_folder"]).shape == (4, 2, 100, 32)


def test_refusals(job, tmp_path):
    with pytest.raises(UserError, match="1 tokens; accepted are at least 2"):
        sample(Session(job("data.max_chars=1")))
    with pytest.raises(UserError, match=r"sample\.context=4096: accepted are 2 to 2048"):
        sample(Session(job("sample.context=4096")))
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        sample(Session(job(f"out={tmp_path}")))
