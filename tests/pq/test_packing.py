import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from million_cli.pq.packing import code_dtype, pack_bits, packed_bytes, unpack_bits


@given(st.integers(1, 16), st.integers(0, 40), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 2**31))
def test_packing_is_a_little_endian_number_and_comes_back(nbits, n, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << nbits, (*batch, n), generator=generator).to(code_dtype(nbits))
    packed = pack_bits(codes, nbits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*batch, packed_bytes(n, nbits))
    rows = zip(
        codes.to(torch.int32).view(-1, n) if n else [],
        packed.view(-1, packed.shape[-1]) if n else [],
        strict=True,
    )
    for code_row, packed_row in rows:
        number = sum(code << (i * nbits) for i, code in enumerate(code_row.tolist()))
        assert bytes(packed_row.tolist()) == number.to_bytes(packed_row.numel(), "little")
    restored = unpack_bits(packed, n, nbits)
    assert restored.dtype == code_dtype(nbits)
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("nbits", [8, 16])
def test_whole_bytes_are_views(nbits):
    codes = torch.arange(12).view(3, 4).to(code_dtype(nbits))
    packed = pack_bits(codes, nbits)
    assert packed.data_ptr() == codes.data_ptr()
    assert unpack_bits(packed, 4, nbits).data_ptr() == codes.data_ptr()


def test_strided_codes_pack_like_contiguous_ones():
    codes = torch.randint(64, (5, 7)).to(torch.uint8)
    assert torch.equal(pack_bits(codes.T, 6), pack_bits(codes.T.contiguous(), 6))
