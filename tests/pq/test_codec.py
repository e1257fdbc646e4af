import subprocess
import sys

import pytest
import torch
from code_cases import B, H, T, distances, make
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli.pq import argmin, codec
from million_cli.pq.argmin import first_argmin, near_argmin
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import decode, encode
from million_cli.pq.packing import code_dtype


@pytest.mark.parametrize("nbits", range(1, 17))
def test_float64_codes_are_the_brute_force_ones(nbits):
    D, M = (24, 4) if nbits <= 10 else (4, 2)
    pq, x = make(D, M, nbits, Hc=H)
    codes = encode(x, pq)
    assert codes.dtype == code_dtype(nbits)
    assert torch.equal(codes.long(), distances(x, pq).argmin(-1))


@pytest.mark.parametrize(("Hc", "Hr"), [(1, 0), (H, 0), (1, 1), (H, H), (1, H)])
@pytest.mark.parametrize("M", [1, 4, 12, 24])
def test_float64_codes_for_any_split_sharing_and_transform(M, Hc, Hr):
    pq, x = make(24, M, 5, Hc, Hr)
    assert torch.equal(encode(x, pq).long(), distances(x, pq).argmin(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [4, 12, 24])
def test_the_chosen_centroid_is_nearest_within_float32_rounding(M, dtype):
    pq, x = make(24, M, 8, H)
    x = x.to(dtype)
    exact = distances(x, pq)
    chosen = exact.gather(-1, encode(x, pq).long()[..., None])[..., 0]
    rounding = (pq.spec.dsub + 2) * torch.finfo(torch.float32).eps
    assert (chosen <= exact.amin(-1) * (1 + rounding)).all()


def test_codes_do_not_depend_on_the_size_of_blocks(monkeypatch):
    pq, x = make(24, 4, 6, H, 1)
    whole, decoded = encode(x, pq), decode(encode(x, pq), pq, torch.float64)
    for block, piece in ((1, 1), (64 * 5, 24 * B * H * 3), (64 * T * 2, 24 * B * H * 16)):
        monkeypatch.setitem(argmin._BLOCK_ELEMENTS, "cpu", block)
        monkeypatch.setitem(codec._SLICE_ELEMENTS, "cpu", piece)
        assert torch.equal(encode(x, pq), whole)
        torch.testing.assert_close(decode(whole, pq, torch.float64), decoded, atol=1e-12, rtol=0)


def test_memory_of_encoding_does_not_grow_with_the_text():
    """All distances at once would be 512 MB."""
    code = """
import resource, torch
torch.set_num_threads(1)
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import encode
from million_cli.spec import CodeSpec
pq = LayerPQ(CodeSpec(8, 4, 8), torch.randn(1, 4, 256, 2))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
encode(torch.randn(1, 1, 100, 8), pq)
x = torch.randn(1, 2, 65536, 8)
before = peak()
encode(x, pq)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 150


@pytest.mark.parametrize(("nbits", "Hc"), [(3, 1), (8, H), (12, H)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decoding_looks_up_the_centroids(nbits, Hc, dtype):
    pq, x = make(8, 4, nbits, Hc)
    codes = encode(x, pq)
    decoded = decode(codes, pq, dtype)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
    expected = torch.empty(B, H, T, 4, 2)
    for h in range(H):
        for m in range(4):
            expected[:, h, :, m] = pq.centroids[h if Hc > 1 else 0, m][codes[:, h, :, m].long()]
    assert torch.equal(decoded, expected.view_as(x).to(dtype))


@pytest.mark.parametrize("Hr", [1, H])
def test_decoding_undoes_the_transform_unless_told_not_to(Hr):
    pq, x = make(8, 4, 6, 1, Hr)
    codes = encode(x, pq)
    mapped = decode(codes, pq, torch.float64, mapped=True)
    assert torch.equal(mapped, decode(codes, LayerPQ(pq.spec, pq.centroids), torch.float64))
    undone = decode(codes, pq, torch.float64)
    torch.testing.assert_close(undone @ pq.transform.encode.double(), mapped, atol=1e-5, rtol=0)
    half = decode(codes, pq, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), undone, atol=0.05, rtol=2**-8)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 10), st.integers(0, 1000))
def test_a_decoded_vector_keeps_its_code(M, nbits, seed):
    pq, x = make(8, M, nbits, H, seed=seed)
    codes = encode(x.float(), pq)
    assert torch.equal(encode(decode(codes, pq, torch.float32), pq), codes)


def test_an_empty_text_has_no_codes():
    pq, x = make(8, 4, 6)
    codes = encode(x[:, :, :0], pq)
    assert codes.shape == (B, H, 0, 4)
    assert decode(codes, pq, torch.float32).shape == (B, H, 0, 8)


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
@examples(50)
def test_first_argmin_is_the_first_of_equals(nbits, rows, values, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values, (2, rows, 1 << nbits), generator=generator).float()
    first = (x == x.amin(-1, keepdim=True)).long().argmax(-1)
    assert torch.equal(first_argmin(x), first)


@pytest.mark.parametrize("C", [2, 256, 512])
def test_near_argmin_is_near(C):
    torch.manual_seed(0)
    x = torch.rand(3, 500, C) ** 8
    x[0, 0, 1] = -1e-9  # what rounding makes of a zero
    found = near_argmin(x.clone())
    least = x.amin(-1).clamp(min=0)  # a few values below zero are rounding
    assert (x.gather(-1, found[..., None])[..., 0] <= least * (1 + 2**-14)).all()
    assert found[0, 0] == 1
