"""Sampling: found again, gone on with, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from million_cli.calibration import calibrate
from million_cli.calibration.information import Information, NoGradients
from million_cli.calibration.samples import Samples
from million_cli.errors import UserError
from million_cli.files import read_safetensors, write_safetensors
from million_cli.pipelines.sample import calibration, run_sample, sample, sample_key
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train
from million_cli.pq import Codebook


def tensors(folder):
    return torch.cat(Samples(Path(folder)).stacked())


def test_a_finished_sample_is_found_again(job, monkeypatch):
    folder = sample(Session(job()))
    monkeypatch.setattr(calibrate, "read_text", None)  # calling it would fail
    assert sample(Session(job())) == folder


def test_an_interrupted_run_goes_on_and_ends_with_the_same_sample(job, tmp_path, monkeypatch):
    config = job(f"out={tmp_path}", "sample.batch=1")
    read, calls = Information.read, []

    def failing(self, ids):
        calls.append(ids[0, :8].tolist())
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return read(self, ids)

    monkeypatch.setattr(calibrate, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(Information, "read", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        sample(Session(config))
    folder = sample(Session(config))
    assert len(calls) == 1 + 8 + 4 + 1  # the window that failed is the only one read twice
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


def test_code_and_repetitions_are_spread_among_the_text(job):
    session = Session(job("sample.repeats=0.2", "sample.code=0.4"))
    text = calibration(Session(job("sample.repeats=0", "sample.code=0"))).windows
    windows = calibration(session).windows
    assert len(windows) == 8 + 4 + 8
    rows, texts = ([row.tolist() for row in part] for part in (windows, text))
    assert [row for row in rows if row in texts] == texts  # in order
    repeating = [row for row in rows if any(row[p:] == row[:-p] for p in range(16, 129))]
    assert len(repeating) == 4
    kinds = ["t" if row in texts else "r" if row in repeating else "c" for row in rows]
    for half in (kinds[:10], kinds[10:]):
        assert sorted(half) == ["c"] * 4 + ["r"] * 2 + ["t"] * 4
    code = [row for row, kind in zip(rows, kinds, strict=True) if kind == "c"]
    assert "import" in "".join(map(session.tokenizer.decode, code))


def test_information_goes_on_after_an_interruption(job, tmp_path, monkeypatch):
    straight = Samples(sample(Session(job("sample.batch=1")))).information()
    config = job(f"out={tmp_path}", "sample.batch=1")
    read, calls = Information.read, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return read(*arguments)

    monkeypatch.setattr(calibrate, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(Information, "read", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        sample(Session(config))
    resumed = Samples(sample(Session(config))).information()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert straight["counts"][1] == 13 * 256


def test_a_model_without_gradients_is_sampled_all_the_same(job, tmp_path, monkeypatch, caplog):
    def refuse(self, input_ids):
        raise NoGradients("the weights are packed")

    monkeypatch.setattr(Information, "read", refuse)
    config = job(f"out={tmp_path}", "quantizer=pq-3bit", "quantizer.bits=1.125")
    codebook = Codebook.load(train(Session(config)))
    assert "trained without Fisher information: the weights are packed" in caplog.text
    assert codebook.meta.recipe.quantizer.keys.metric == "euclidean"
    assert codebook.meta.key_predicted_kl == []
    assert [spec.M for spec in codebook.keys.specs] == [16, 16]
    assert [spec.M for spec in codebook.values.specs] == [8, 8]


@pytest.mark.parametrize("override", ["sample.repeats=1", "sample.code=-0.1", "sample.code=0.95"])
def test_shares_are_checked(job, override):
    with pytest.raises(UserError, match="accepted are shares from 0, together below 1"):
        job(override)


def test_squares_are_those_of_the_sampled_tokens(job):
    """Whatever the batch, each kept token has the squared gradient of its own place in its own window."""
    config = job("sample.reservoir=100000")
    session = Session(config)
    windows = calibration(session).windows
    information = Information(session.model, seed=config.seed)
    got = Samples(sample(session)).squares()[0][0]
    expected = [information.read(window[None])[0].squares[0, 0] for window in windows]
    torch.testing.assert_close(got, torch.cat(expected, 1), rtol=1e-4, atol=1e-12)


def test_damaged_samples_are_one_line(job, tmp_path):
    config = job(f"out={tmp_path}")
    folder = sample(Session(config))
    manifest, shard = folder / "manifest.json", next(folder.glob("layer-*.safetensors"))
    whole = json.loads(manifest.read_text())
    damaged = [{k: v for k, v in whole.items() if k != name} for name in whole]
    damaged += [{**whole, "progress": {}}, {**whole, "shards": {}}, {**whole, "fingerprint": {}}, []]
    for content in (*damaged, "[" * 100_000):
        manifest.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError) as error:
            sample(Session(config))
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
    manifest.write_text(json.dumps({**whole, "progress": {**whole["progress"], "done": False}}))
    tensors, _ = read_safetensors(shard)
    for name in tensors:
        write_safetensors(shard, {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(UserError, match=r"the samples of layer \d are damaged"):
            sample(Session(config))
