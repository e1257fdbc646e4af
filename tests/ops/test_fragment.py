"""Fragment order: packing is a bijection, and each lane gets what the kernel's lane expects."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from million_cli.ops.build import source_folder
from million_cli.ops.fragment import DSUBS, FragmentLayout, Side, fragment_reason
from million_cli.spec import CodeSpec

SPECS = [CodeSpec(D, D // dsub, 8) for D in (64, 128) for dsub in DSUBS]


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
@pytest.mark.parametrize("D", [64, 128])
def test_codes_of_one_dim_go_in_pairs(D: int, side: Side) -> None:
    """The codes of a word's halves are side by side (keys) or four bytes apart (values), in one lane."""
    tokens, subspaces = owners(CodeSpec(D, D, 8), side)
    step = 1 if side == "keys" else 4
    low = [i for i in range(D // 2) if i // step % 2 == 0]
    for i in low:
        assert torch.equal(tokens[:, i], tokens[:, i + step])
        assert torch.equal(subspaces[:, i] + 1, subspaces[:, i + step])
        assert (subspaces[:, i] % 2 == 0).all()


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("spec", SPECS)
def test_lookups_of_a_warp_fall_in_different_banks(spec: CodeSpec, side: Side) -> None:
    """One instruction looks up byte i of all lanes: 4 bytes in one pass, 8 and 16 in parts of a warp."""
    _, subspaces = owners(spec, side)
    words = max(spec.dsub // 2, 1)
    together = 32 // words
    shared = 2 if spec == CodeSpec(64, 16, 8) and side == "values" else 1  # 16 entries for 16 lanes of 8 rows
    for i in range(spec.M // 2):
        for first in range(0, 32, together):
            banks = subspaces[first : first + together, i] * spec.dsub // 2 % 32
            assert len(set(banks.tolist())) * shared == together


def fold(spec: CodeSpec, side: Side) -> int:
    """A number that the positions of all codes of a group make, as kernels/layout_check.cu does."""
    codes = torch.arange(16 * spec.M).view(16, spec.M)
    high, low = (
        FragmentLayout(spec, 16, side).pack(part.to(torch.uint8)) for part in (codes >> 8, codes & 255)
    )
    folded = 0
    for code in (high.long() << 8 | low.long()).flatten().argsort().tolist():
        folded = (folded * 31 + code) % 2**32
    return folded


@pytest.mark.parametrize("spec", SPECS)
def test_kernels_have_the_same_order(spec: CodeSpec) -> None:
    text = (source_folder() / "layout_check.cu").read_text()
    line = re.search(rf"^MILLION_CHECK_ORDER\({spec.head_dim}, {spec.M}, (\w+), (\w+)\)$", text, re.MULTILINE)
    assert line is not None
    assert [int(line[1], 16), int(line[2], 16)] == [fold(spec, "keys"), fold(spec, "values")]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (CodeSpec(128, 64, 8), None),
        (CodeSpec(96, 48, 8), "head_dim=96, supported are 64 and 128"),
        (CodeSpec(128, 64, 4), "nbits=4, supported is 8"),
        (CodeSpec(128, 128, 8), None),
        (CodeSpec(64, 8, 8), None),
        (CodeSpec(128, 8, 8), "M=8, supported are 128, 64, 32, 16"),
    ],
)
def test_reason(spec: CodeSpec, reason: str | None) -> None:
    assert fragment_reason(spec) == reason
