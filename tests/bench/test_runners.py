"""A runner refuses to report a decode that gives NaN or infinity."""

from __future__ import annotations

import pytest
import torch
from tiny_models import new_model, random_ids

from million_cli.bench.runners import EngineRunner, StaticRunner
from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["engine", "static"])
def test_a_decode_that_is_not_finite_has_no_row(kind, value):
    model = new_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = value
    if kind == "engine":
        runner = EngineRunner(Engine(model, DenseCache(model, 40), graphs=None), 2)
    else:
        runner = StaticRunner(model, 40)
    runner.prefill(random_ids(1, 20))
    with pytest.raises(UserError, match="the logits hold NaN or infinity, so nothing is timed"):
        runner.facts()
