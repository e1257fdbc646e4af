"""The effect of coding one side of one layer, measured."""

from __future__ import annotations

import pytest
import torch

from million_cli.calibration.measured import Measure
from million_cli.pipelines.sample import calibration
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train
from million_cli.pq import Codebook


@pytest.fixture
def small(job):
    session = Session(job())
    return session, Codebook.load(train(session))


def test_a_side_alone_costs_less_than_all_of_them_and_fewer_bits_cost_more(job, small):
    session, codebook = small
    coarse = Codebook.load(train(Session(job("quantizer=pq-2bit"))))
    windows = calibration(session).windows[:4]
    measure = Measure(session.model, lambda: windows, session.config.cache.window(), batch=4)
    for side in ("keys", "values"):
        for i in range(2):
            fine = measure(side, i, getattr(codebook, side).layer(i))
            assert 0 < fine < measure(side, i, getattr(coarse, side).layer(i))
    ((ids, logits),) = measure.dense
    assert torch.equal(ids, torch.stack(windows))
    assert logits.shape[:2] == (4, 255)


def test_windows_are_asked_for_once_and_may_differ_in_length(small):
    session, codebook = small
    whole = calibration(session).windows[:2]
    calls = []

    def windows():
        calls.append(None)
        return [whole[0], whole[1][:100]]

    window = session.config.cache.window()
    together = Measure(session.model, windows, window, batch=4)
    apart = [Measure(session.model, lambda part=part: [part], window, batch=4) for part in windows()]
    pq = codebook.keys.layer(0)
    kl, alone = together("keys", 0, pq), [one("keys", 0, pq) for one in apart]
    assert kl == pytest.approx((alone[0] * 255 + alone[1] * 99) / 354)
    together("keys", 0, pq)
    assert len(calls) == 2
    assert [ids.shape for ids, _ in together.dense] == [(1, 256), (1, 100)]


def test_budgets_are_measured_unless_told_otherwise(job):
    def made(*overrides):
        return calibration(Session(job(*overrides)))

    measure = made("quantizer.bits=1.125", "train.measured=512", "sample.long=512").measure()
    assert measure is not None
    assert [ids.shape for ids, _ in measure.dense] == [(1, 256), (1, 512)]  # one as read, one with far copies
    assert made("quantizer.bits=1.125", "train.measured=0").measure() is None
    assert made().measure() is None
