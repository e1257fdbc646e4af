"""The device's lengths: tensor and host hold the same number."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from million_cli.cache.device_lengths import DeviceLengths

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 300)), min_size=1, max_size=20))
def test_the_tensor_holds_what_was_asked_for(calls):
    lengths = DeviceLengths()
    tensor, expected = lengths.hold(CPU, 3, 7), 7
    for launched, number in calls:
        if launched:  # a replayed step counts on the device, the host is told afterwards
            lengths.on(CPU).add_(number)
            lengths.advance(number)
            expected += number
        else:
            lengths.hold(CPU, 3, number)
            expected = number
        assert lengths.hold(CPU, 3, expected) is tensor
        assert tensor.tolist() == [expected] * 3
    assert lengths.nbytes == 12


def test_another_batch_gets_another_tensor():
    lengths = DeviceLengths()
    small = lengths.hold(CPU, 2, 5)
    assert lengths.hold(CPU, 4, 5).tolist() == [5] * 4
    assert small.tolist() == [5, 5]
    lengths.forget()
    assert lengths.tensors() == []
