import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli.ops.codes import ContiguousCodes, PagedCodes
from million_cli.ops.layouts import RowLayout, TransposedLayout
from million_cli.pq.packing import code_dtype
from million_cli.spec import CodeSpec

torch.set_num_threads(1)
LAYOUTS = [RowLayout, TransposedLayout]


def random_codes(spec: CodeSpec, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(spec.C, (*shape, spec.M), generator=generator).to(code_dtype(spec.nbits))


@pytest.mark.parametrize("layout_type", LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("nbits", range(1, 17))
def test_unpack_inverts_pack(layout_type, page_size, nbits):
    spec = CodeSpec(head_dim=12, M=6, nbits=nbits)
    layout = layout_type(spec, page_size)
    codes = random_codes(spec, 2, 3, page_size)
    packed = layout.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, *layout.page_shape)
    assert packed[0, 0].nbytes == layout.page_bytes
    unpacked = layout.unpack(packed)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("nbits", range(1, 17))
def test_bytes_are_the_nominal_bits(nbits):
    spec = CodeSpec(head_dim=64, M=32, nbits=nbits)
    nominal_bits = spec.bits_per_element * spec.head_dim * 64
    assert RowLayout(spec, 64).page_bytes * 8 == nominal_bits  # 32 codes end on a byte whatever nbits is
    assert TransposedLayout(spec, 64).page_bytes * 8 == nominal_bits


def test_rows_are_padded_to_bytes_and_transposed_pages_are_not():
    spec = CodeSpec(head_dim=10, M=5, nbits=3)
    assert RowLayout(spec, 16).page_shape == (16, 2)
    assert TransposedLayout(spec, 16).page_shape == (5, 6)


def test_where_each_code_is():
    spec = CodeSpec(head_dim=8, M=4, nbits=8)
    codes = random_codes(spec, 16)
    row, transposed = RowLayout(spec, 16).pack(codes), TransposedLayout(spec, 16).pack(codes)
    for t in range(16):
        for m in range(4):
            assert row[t, m] == transposed[m, t] == codes[t, m]


def test_where_each_nibble_is():
    spec = CodeSpec(head_dim=8, M=4, nbits=4)
    codes = random_codes(spec, 16)
    row, transposed = RowLayout(spec, 16).pack(codes), TransposedLayout(spec, 16).pack(codes)
    for t in range(16):
        for m in range(4):
            assert (row[t, m // 2] >> 4 * (m % 2)) & 15 == codes[t, m]
            assert (transposed[m, t // 2] >> 4 * (t % 2)) & 15 == codes[t, m]


@examples(40)
@given(
    layout_type=st.sampled_from(LAYOUTS),
    nbits=st.sampled_from([1, 3, 4, 8, 11, 16]),
    page_size=st.sampled_from([16, 32]),
    pages=st.integers(1, 4),
    data=st.data(),
)
def test_readers_return_any_span_of_the_codes(layout_type, nbits, page_size, pages, data):
    B, Hkv, spec = 2, 3, CodeSpec(head_dim=10, M=5, nbits=nbits)
    length = pages * page_size
    codes = random_codes(spec, B, Hkv, length)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))

    layout = layout_type(spec, page_size)
    ids = torch.randperm(B * pages + 2)[: B * pages].view(B, pages)
    table = torch.zeros(B, pages + 1, dtype=torch.int32)
    table[:, :pages] = ids
    pool = torch.zeros(B * pages + 2, Hkv, *layout.page_shape, dtype=torch.uint8)
    for b in range(B):
        for i in range(pages):
            pool[ids[b, i]] = layout.pack(codes[b, :, i * page_size : (i + 1) * page_size])
    assert torch.equal(PagedCodes(pool, table, layout, length).read(start, stop), codes[:, :, start:stop])

    rows = RowLayout(spec, page_size)
    packed = torch.zeros(B, Hkv, length + 7, spec.row_bytes, dtype=torch.uint8)
    packed[:, :, :length] = rows.pack(codes)
    assert torch.equal(ContiguousCodes(packed, rows, length).read(start, stop), codes[:, :, start:stop])
