"""One calibration, by the command line and by the Python API: the same codebook."""

from __future__ import annotations

import pytest
import torch

import million_cli
from million_cli.calibration import calibrate
from million_cli.calibration.calibrate import Calibration
from million_cli.calibration.samples import Samples
from million_cli.errors import UserError
from million_cli.pipelines.sample import calibration
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train
from million_cli.pq import Codebook
from million_cli.recipe import Recipe
from million_cli.text import Text

BUDGET = ["quantizer.bits=1.125", "train.measured=512", "seed=3"]


def same(one: Codebook, other: Codebook) -> bool:
    """Bit by bit: centroids, transforms, codes and what the cards say of errors."""
    for a, b in ((one.keys, other.keys), (one.values, other.values)):
        if a.specs != b.specs or not all(map(torch.equal, a.centroids, b.centroids)):
            return False
        if (a.transform is None) != (b.transform is None):
            return False
        if a.transform is not None and not torch.equal(a.transform.encode, b.transform.encode):
            return False
    return (one.meta.key_error, one.meta.recipe) == (other.meta.key_error, other.meta.recipe)


def by_python(session, recipe=None, **options):
    config = session.config
    return million_cli.train_codebook(
        session.model,
        session.tokenizer,
        session.text(config.data).content,
        recipe or config.recipe,
        seed=config.seed,
        window=config.cache.window(),
        show_progress=False,
        **options,
    )


@pytest.mark.parametrize("overrides", [BUDGET, ["quantizer=million-paper"]], ids=["pq-4bit", "million-paper"])
def test_python_and_the_command_line_train_the_same_codebook(job, tmp_path, overrides):
    session = Session(job(*overrides))
    theirs = Codebook.load(train(session))
    assert same(by_python(session), theirs)
    assert same(by_python(session, folder=tmp_path / "kept"), theirs)
    if overrides is BUDGET:
        assert len({spec for side in (theirs.keys, theirs.values) for spec in side.specs}) > 1


def test_a_name_is_enough(job):
    session = Session(job())
    codebook = by_python(session, "million-paper")
    assert codebook.meta.recipe == Recipe.named("million-paper")


def test_an_interrupted_calibration_goes_on(job, tmp_path, monkeypatch):
    session = Session(job("sample.batch=1"))
    straight = by_python(session)
    read, calls = calibrate.Information.read, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return read(*arguments)

    monkeypatch.setattr(calibrate, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(calibrate.Information, "read", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        by_python(session, folder=tmp_path)
    assert same(by_python(session, folder=tmp_path), straight)
    assert len(calls) == 1 + len(calibration(session).windows)
    assert same(by_python(session, folder=str(tmp_path)), straight)
    assert len(calls) == 1 + len(calibration(session).windows)  # found done


@pytest.mark.parametrize("override", ["sample.context=128", "sample.code=0", "data.seed=4"])
def test_a_folder_of_another_calibration_is_refused(job, tmp_path, override):
    calibration(Session(job())).sample(tmp_path)
    with pytest.raises(UserError, match="holds samples of another text, tokenizer or recipe"):
        by_python(Session(job(override)), folder=tmp_path)
    other = calibration(Session(job(override))).sample(tmp_path, resume=False)
    assert Samples(tmp_path).manifest["seen"] == other.tokens


def test_samples_know_where_in_their_windows_they_were(job):
    made = calibration(Session(job("sample.reservoir=100000", "sample.batch=4")))
    sampled = made.sample()
    assert len(made.windows) == 13
    expected = torch.arange(256).repeat(13)  # window after window, whatever the batch
    assert all(torch.equal(layer, expected) for layer in sampled.positions)


def test_both_ways_to_keep_samples_agree(job, tmp_path):
    made = calibration(Session(job()))
    memory, folder = made.sample(), made.sample(tmp_path)
    assert memory.tokens == folder.tokens
    for i in range(2):
        assert torch.equal(memory.positions[i], folder.positions[i])
        for a, b in zip(
            (memory.keys, memory.values, *memory.squares),
            (folder.keys, folder.values, *folder.squares),
            strict=True,
        ):
            assert torch.equal(a[i], b[i])
    for name, gathered in memory.information.items():
        assert torch.equal(gathered, folder.information[name])


def test_an_empty_text_is_refused(job):
    session = Session(job())
    with pytest.raises(UserError, match="the calibration text is empty"):
        Calibration(session.model, session.tokenizer, Text(" \n", "nothing"), Recipe())
