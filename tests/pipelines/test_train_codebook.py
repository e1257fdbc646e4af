"""Training as a stage."""

from __future__ import annotations

import pytest
import torch

from million_cli.calibration.calibrate import Calibration
from million_cli.errors import UserError
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import run_train, train
from million_cli.pq import Codebook
from million_cli.results import git_commit, running
from million_cli.spec import CodeSpec


def test_the_codebook_says_where_it_comes_from(job):
    session = Session(job("seed=4"))
    codebook = Codebook.load(train(session))
    text = session.text(session.config.data)
    assert codebook.meta.fingerprint == session.fingerprint
    assert codebook.meta.calibration_sha256 == text.sha256
    assert (codebook.meta.seed, codebook.meta.tokens, codebook.meta.samples) == (4, 3328, 480)
    assert codebook.keys.specs == (CodeSpec(32, 16, 3),) * 2
    assert codebook.meta.recipe == session.config.recipe
    assert (codebook.keys.scope, codebook.meta.held_out) == ("head", 32)
    assert (codebook.meta.command, codebook.meta.commit) == ("", git_commit())  # nobody gave a command


def test_the_codebook_names_the_command_that_made_it(job, tmp_path):
    token = running.set("million train-codebook x=1")
    try:
        codebook = Codebook.load(train(Session(job(f"out={tmp_path}"))))
    finally:
        running.reset(token)
    assert codebook.meta.command == "million train-codebook x=1"


def test_a_trained_codebook_is_found_again(job, monkeypatch):
    path = train(Session(job()))
    monkeypatch.setattr(Calibration, "train", None)  # calling it would fail
    assert train(Session(job())) == path


def test_the_same_job_elsewhere_trains_the_same_codebook(job, tmp_path):
    here, there = (Codebook.load(train(Session(c))) for c in (job(), job(f"out={tmp_path}")))
    for side in ("keys", "values"):
        for a, b in zip(getattr(here, side).centroids, getattr(there, side).centroids, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "quantizer.scope=layer", "quantizer.values.nbits=2", "train.iterations=3", "data.seed=7"],
)
def test_another_job_has_another_codebook(job, override):
    assert train(Session(job(override))) != train(Session(job()))


def test_quantizers_differ_as_configured(job):
    shapes = {}
    budget = {"pq-3bit": ["quantizer.bits=1.125"]}  # of codes of 3 bits
    for name in ("million-paper", "pq-4bit", "pq-3bit", "pq-2bit"):
        codebook = Codebook.load(train(Session(job(f"quantizer={name}", *budget.get(name, [])))))
        shapes[name] = (
            [tuple(table.shape[:2]) for table in codebook.keys.centroids],
            [spec.M for spec in codebook.values.specs],
            codebook.bits_per_element,
            codebook.meta.recipe.quantizer.keys.metric,
        )
    keys, values, *rest = shapes.pop("pq-3bit")
    assert sum([*(M for _, M in keys), *values]) == 48  # of 32 dimensions each: 1.125 bits an element
    assert len({*(M for _, M in keys), *values}) > 1
    assert rest == [1.125, "fisher"]
    assert shapes == {
        "million-paper": ([(1, 16)], [16, 16], 1.5, "euclidean"),
        "pq-4bit": ([(2, 16)] * 2, [16, 16], 1.5, "fisher"),
        "pq-2bit": ([(2, 8)] * 2, [8, 8], 0.75, "fisher"),
    }


def test_faiss_trains_as_well(job):
    errors = {
        trainer: run_train(job(f"train.trainer={trainer}", "train.iterations=25"))[0].metrics["key_error"]
        for trainer in ("torch", "faiss")
    }
    assert errors["faiss"] == pytest.approx(errors["torch"], rel=0.1)


def test_refusals(job):
    with pytest.raises(UserError, match="quantizer=dense: it has no codebook"):
        run_train(job("quantizer=dense"))
    with pytest.raises(UserError, match="M=5 does not divide head_dim=32"):
        train(Session(job("quantizer.keys.M=5")))
    with pytest.raises(UserError, match="dsub=3 does not divide head_dim=32"):
        train(Session(job("quantizer.keys.dsub=3")))
    with pytest.raises(UserError, match=r"bits=4: accepted are 0\.375 to 3"):
        train(Session(job("quantizer.bits=4")))
    with pytest.raises(UserError, match=r"quantizer\.keys\.M=8: quantizer\.bits=1 chooses it by layer"):
        job("quantizer.bits=1", "quantizer.keys.M=8")
    with pytest.raises(UserError, match=r"values\.nbits=4: accepted with quantizer\.bits is that of keys, 3"):
        job("quantizer.bits=1", "quantizer.values.nbits=4")
    with pytest.raises(UserError, match=r"quantizer\.widths=\[\]"):
        job("quantizer.bits=1", "quantizer.widths=[]")
