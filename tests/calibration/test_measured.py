"""The effect of coding one side of one layer, measured."""

from __future__ import annotations

import pytest

from million_cli.calibration import measured
from million_cli.calibration.measured import Measure
from million_cli.pipelines.sample import calibration_windows
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train
from million_cli.pq import Codebook


@pytest.fixture
def small(job):
    session = Session(job())
    return session, Codebook.load(train(session))


def test_a_side_alone_costs_less_than_all_of_them_and_fewer_bits_cost_more(job, small, monkeypatch):
    session, codebook = small
    coarse = Codebook.load(train(Session(job("quantizer=pq-2bit"))))
    measure = Measure(session, tokens=1024)
    for side in ("keys", "values"):
        for i in range(2):
            fine = measure(side, i, getattr(codebook, side).layer(i))
            assert 0 < fine < measure(side, i, getattr(coarse, side).layer(i))
    windows = calibration_windows(session, repeats=False)
    ((ids, logits),) = measure._dense
    assert ids.tolist() == windows[[len(windows) * (2 * n + 1) // 8 for n in range(4)]].tolist()
    assert logits.shape[:2] == (4, 255)
    monkeypatch.setattr(measured, "calibration_windows", None)  # read once
    measure("keys", 0, codebook.keys.layer(0))


def test_at_least_one_window_is_read(small):
    session, codebook = small
    measure = Measure(session, tokens=1)
    assert measure("values", 0, codebook.values.layer(0)) > 0
    assert [len(ids) for ids, _ in measure._dense] == [1]


def test_budgets_are_measured_unless_told_otherwise(job, tmp_path, monkeypatch):
    budget = ["quantizer.bits=1.125", f"out={tmp_path}"]
    used = []
    monkeypatch.setattr(
        "million_cli.pipelines.train_codebook.Measure",
        lambda session, tokens: lambda side, layer, pq: used.append((side, layer, tokens)) or 1e-3,
    )
    first = train(Session(job(*budget, "train.measured=256")))
    assert used == [(side, i, 256) for side in ("keys", "values") for i in range(2)]
    assert train(Session(job(*budget, "train.measured=0"))) != first
    assert len(used) == 4
