import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.errors import UserError
from million_cli.spec import CodeSpec, ModelFingerprint, PQSpec, WindowSpec


def test_code_spec_counts_bits_and_bytes():
    spec = CodeSpec(head_dim=128, M=64, nbits=8)
    assert (spec.dsub, spec.C, spec.row_bytes, spec.bits_per_element) == (2, 256, 64, 4.0)
    spec = CodeSpec(head_dim=96, M=3, nbits=7)
    assert (spec.dsub, spec.C, spec.row_bytes, spec.bits_per_element) == (32, 128, 3, 21 / 96)
    assert PQSpec(CodeSpec(128, 64, 8), CodeSpec(128, 32, 8)).bits_per_element == 3.0


@pytest.mark.parametrize(
    ("head_dim", "M", "nbits", "message"),
    [
        (64, 24, 8, r"M=24 does not divide head_dim=64; accepted: \[1, 2, 4, 8, 16, 32, 64\]"),
        (64, 0, 8, "M=0 does not divide head_dim=64"),
        (64, 128, 8, "M=128 does not divide head_dim=64"),
        (64, 32, 0, "nbits=0: a code has 1 to 16 bits"),
        (64, 32, 17, "nbits=17: a code has 1 to 16 bits"),
    ],
)
def test_code_spec_refuses(head_dim, M, nbits, message):
    with pytest.raises(UserError, match=message):
        CodeSpec(head_dim, M, nbits)


windows = st.builds(
    lambda pages, size: WindowSpec(16 * size, 16 * size * pages), st.integers(2, 5), st.integers(1, 8)
)


@given(windows, st.integers(0, 2000))
def test_coded_length_is_what_encoding_a_page_of_a_full_window_gives(window, length):
    coded = exact = 0
    for _ in range(length):
        exact += 1
        if exact == window.residual:
            exact -= window.page_size
            coded += window.page_size
    assert window.coded_length(length) == coded


@pytest.mark.parametrize(
    ("page_size", "residual", "message"),
    [
        (0, 128, "page_size=0: accepted are multiples of 16 from 16 to 256"),
        (24, 48, "page_size=24"),
        (512, 1024, "page_size=512"),
        (64, 64, "extended_residual=64: accepted are multiples of page_size=64 from 128"),
        (64, 32, "extended_residual=32"),
        (64, 160, "extended_residual=160"),
    ],
)
def test_window_spec_refuses(page_size, residual, message):
    with pytest.raises(UserError, match=message):
        WindowSpec(page_size, residual)


def test_fingerprint_names_each_difference_and_survives_json():
    one = ModelFingerprint("llama", 4, (0, 1, 2, 3), 2, 64, "abc")
    two = ModelFingerprint("llama", 4, (1, 3), 2, 128, "abc")
    assert one.differences(one) == []
    assert one.differences(two) == ["layers: (0, 1, 2, 3) != (1, 3)", "head_dim: 64 != 128"]
    assert ModelFingerprint.from_dict(json.loads(json.dumps(one.to_dict()))) == one
