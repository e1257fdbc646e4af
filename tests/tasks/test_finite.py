"""Tasks refuse NaN and infinity, also when `measure` is called directly."""

from __future__ import annotations

import pytest
import torch

from million_cli.errors import UserError
from million_cli.registry import TASKS
from million_cli.tasks.base import TaskResult, finite


@pytest.mark.parametrize("name", TASKS.names)
def test_every_measure_is_marked(name):
    assert TASKS.load(name).measure.refuses_nonfinite


def test_logits_and_metrics_are_checked(tiny):
    ids = torch.tensor([[3, 4, 5]])

    @finite("own")
    def measure(model, caches, metric):
        model(ids, past_key_values=caches("exact"))
        return TaskResult({"score": metric, "name": "x", "n": 3})

    assert finite("own")(measure) is measure
    assert measure(tiny.model, tiny.caches("dense"), 0.5).metrics["score"] == 0.5
    with pytest.raises(UserError, match="task=own gave score=inf"):
        measure(tiny.model, tiny.caches("dense"), float("inf"))
    norm = tiny.model.model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm.mul_(torch.nan)
    try:
        with pytest.raises(UserError, match="the logits hold NaN or infinity, so nothing is measured"):
            measure(tiny.model, tiny.caches("dense"), 0.5)
    finally:
        with torch.no_grad():
            norm.copy_(before)
