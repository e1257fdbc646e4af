"""Fragment order: packing is a bijection, and each lane gets what the kernel's lane expects."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from million_cli.ops.fragment import FragmentLayout, Side, fragment_reason
from million_cli.spec import CodeSpec

SPECS = [CodeSpec(128, 64, 8), CodeSpec(128, 32, 8), CodeSpec(64, 32, 8), CodeSpec(64, 16, 8)]


@given(st.sampled_from(SPECS), st.sampled_from([16, 48, 256]), st.sampled_from(["keys", "values"]), st.data())
def test_round_trip(spec: CodeSpec, page: int, side: Side, data: st.DataObject) -> None:
    layout = FragmentLayout(spec, page, side)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    codes = torch.randint(0, 256, (2, 3, page, spec.M), dtype=torch.uint8, generator=generator)
    packed = layout.pack(codes)
    assert packed.shape == (2, 3, *layout.page_shape)
    assert packed[0, 0].numel() == layout.page_bytes == page * spec.M
    assert torch.equal(layout.unpack(packed), codes)


def owners(spec: CodeSpec, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and subspace of each byte, as [lane, byte of the lane]."""
    chunk = min(16, spec.M // 2)
    found = []
    for values in (torch.arange(16)[:, None].expand(16, spec.M), torch.arange(spec.M).expand(16, spec.M)):
        packed = FragmentLayout(spec, 16, side).pack(values.to(torch.uint8))[0]
        found.append(packed.view(-1, 32, chunk).transpose(0, 1).flatten(1).long())
    return found[0], found[1]


@pytest.mark.parametrize("spec", SPECS)
def test_lanes_of_keys_hold_two_tokens(spec: CodeSpec) -> None:
    tokens, _ = owners(spec, "keys")
    for lane in range(32):
        assert set(tokens[lane].tolist()) == {lane // 4, lane // 4 + 8}


@pytest.mark.parametrize("spec", SPECS)
def test_lanes_of_values_hold_four_tokens(spec: CodeSpec) -> None:
    tokens, _ = owners(spec, "values")
    for lane in range(32):
        t = lane % 4
        assert tokens[lane].tolist() == [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9] * (spec.M // 8)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("spec", SPECS[:3])
def test_lookups_of_a_warp_fall_in_different_banks(spec: CodeSpec, side: Side) -> None:
    """One instruction looks up byte i of all lanes: 4-byte entries in one pass, 8-byte ones in halves."""
    _, subspaces = owners(spec, side)
    words = spec.dsub // 2
    passes = 32 // words
    for i in range(spec.M // 2):
        for lanes in range(0, 32, passes):
            banks = subspaces[lanes : lanes + passes, i] * words % 32
            assert len(set(banks.tolist())) == passes


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (CodeSpec(128, 64, 8), None),
        (CodeSpec(96, 48, 8), "head_dim=96, supported are 64 and 128"),
        (CodeSpec(128, 64, 4), "nbits=4, supported is 8"),
        (CodeSpec(128, 128, 8), "M=128, supported are 64 and 32"),
    ],
)
def test_reason(spec: CodeSpec, reason: str | None) -> None:
    assert fragment_reason(spec) == reason
