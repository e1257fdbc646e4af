"""Projections joined for compiled steps: nothing changes but the number of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from tiny_models import new_model, random_ids
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from million_cli.engine.joined import JoinedLinear, join_projections, part_projections


def compiled(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits of the traced model, and how many products its graph has."""
    products = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal products
        kinds = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        products += sum(node.target in kinds for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    forward = torch.compile(model.forward, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    with torch.no_grad():
        return forward(input_ids=ids, use_cache=False).logits, products


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_one_product_for_one_input(architecture):
    model, ids = new_model(architecture), random_ids(1, 5)
    plain, before = compiled(model, ids)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    assert join_projections(model) == 4  # of two layers
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    joined, after = compiled(model, ids)
    assert (before, after) == (2 * 7 + 1, 2 * 4 + 1)
    torch.testing.assert_close(joined, plain, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, new_model(architecture)(ids).logits)  # eager code is the same
    part_projections(model)
    parted, again = compiled(model, ids)
    assert again == before
    assert torch.equal(parted, plain)


def test_weights_that_change_in_place_or_are_replaced():
    model, ids = new_model(), random_ids(1, 5)
    join_projections(model)
    key = model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        key.weight.mul_(2)
        torch.testing.assert_close(compiled(model, ids)[0], model(ids).logits, rtol=1e-12, atol=1e-12)
    key.weight = nn.Parameter(key.weight.detach().clone() / 2)
    assert not key.is_view
    assert join_projections(model) == 4
    assert key is not model.model.layers[0].self_attn.k_proj  # joined anew
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, ids)[0], model(ids).logits, rtol=1e-12, atol=1e-12)


def test_what_is_not_plain_is_left_alone():
    model = new_model()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.q_proj.register_forward_hook(lambda *_: None)
    mlp.up_proj.bias = nn.Parameter(torch.zeros(48, dtype=torch.float64))
    assert join_projections(model) == 2
    assert type(attention.k_proj) is nn.Linear
    assert type(mlp.gate_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.gate_proj, JoinedLinear)
    assert join_projections(new_model("phi3")) == 0  # joined by its own code
