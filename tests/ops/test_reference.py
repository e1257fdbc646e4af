"""Attention over codes against its definition, written token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from million_cli.ops import reference
from million_cli.ops.codes import ContiguousCodes
from million_cli.ops.layouts import RowLayout
from million_cli.ops.reference import attention
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.packing import code_dtype
from million_cli.pq.transform import Transform
from million_cli.spec import CodeSpec

torch.set_num_threads(1)
D = 8


def random_side(
    M: int, nbits: int, heads: int, map_heads: int, B: int, Hkv: int, T: int
) -> tuple[LayerPQ, Tensor]:
    """A quantizer and codes `[B, Hkv, T, M]`, all random (the global generator's)."""
    spec = CodeSpec(D, M, nbits)
    transform = None
    if map_heads:
        maps = torch.linalg.qr(torch.randn(map_heads, D, D, dtype=torch.float64))[0]
        transform = Transform.invertible((maps * (0.5 + torch.rand(map_heads, 1, D))).float())
    codes = torch.randint(spec.C, (B, Hkv, T, M)).to(code_dtype(nbits))
    return LayerPQ(spec, torch.randn(heads, M, spec.C, spec.dsub), transform), codes


def reader(codes: Tensor, spec: CodeSpec) -> ContiguousCodes:
    layout = RowLayout(spec, 16)
    return ContiguousCodes(layout.pack(codes), layout, codes.shape[2])


def decoded(codes: Tensor, pq: LayerPQ) -> Tensor:
    """float64 `[B, Hkv, T, D]`, one centroid at a time."""
    B, Hkv, T, M = codes.shape
    out = torch.empty(B, Hkv, T, D, dtype=torch.float64)
    for h in range(Hkv):
        centroids = pq.centroids[h % pq.centroids.shape[0]].double()
        vectors = torch.cat([centroids[m][codes[:, h, :, m].long()] for m in range(M)], dim=-1)
        if pq.transform is not None:
            vectors = vectors @ pq.transform.decode[h % pq.transform.decode.shape[0]].double()
        out[:, h] = vectors
    return out


@dataclass(repr=False)
class Case:
    """One call: `arguments` for `attention`, and the same call's vectors in float64 for the definition."""

    query: Tensor
    positional: tuple
    coded_k: Tensor
    coded_v: Tensor
    exact_k: Tensor
    exact_v: Tensor
    boundaries: list[int]

    def run(self, **options) -> Tensor:
        return attention(self.query, *self.positional, boundaries=self.boundaries, **options)

    def define(
        self,
        scale: float,
        mask: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        first_valid: Tensor | None = None,
    ) -> Tensor:
        """`[B, Hq, N, D]` float64, row by row; rows that see nothing are NaN."""
        B, Hq, N, _ = self.query.shape
        G = Hq // self.exact_k.shape[1]
        length = self.boundaries[0] + self.exact_k.shape[2]
        out = torch.empty(B, Hq, N, D, dtype=torch.float64)
        for b in range(B):
            for h in range(Hq):
                for i, boundary in enumerate(self.boundaries):
                    skip = boundary - self.boundaries[0]
                    k = torch.cat(
                        [self.coded_k[b, h // G, :boundary], self.exact_k[b, h // G, skip:].double()]
                    )
                    v = torch.cat(
                        [self.coded_v[b, h // G, :boundary], self.exact_v[b, h // G, skip:].double()]
                    )
                    s = k @ self.query[b, h, i].double() * scale
                    if softcap is not None:
                        s = softcap * torch.tanh(s / softcap)
                    seen = torch.arange(length) <= length - N + i
                    if mask is not None:
                        row = mask[b % mask.shape[0], h % mask.shape[1], i, :length]
                        seen = row if mask.dtype == torch.bool else row > torch.finfo(row.dtype).min
                        s = s if mask.dtype == torch.bool else s + row.double()
                    if first_valid is not None:
                        seen = seen & (torch.arange(length) >= first_valid[b])
                    s = s.masked_fill(~seen, -torch.inf)
                    if sinks is not None and seen.any():
                        weights = torch.cat([s, sinks[h : h + 1].double()]).softmax(0)[:-1]
                    else:
                        weights = s.softmax(0)
                    out[b, h, i] = weights @ v
        return out


def make_case(
    *,
    B: int = 2,
    Hkv: int = 2,
    G: int = 2,
    N: int = 1,
    boundaries: list[int] | None = None,
    exact: int = 5,
    keys: tuple[int, int] = (4, 4),
    values: tuple[int, int] = (2, 5),
    per_head: bool = True,
    mapped: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """`keys`, `values`: (M, nbits); `exact`: exact tokens past the last boundary."""
    torch.manual_seed(seed)
    boundaries = [20] * N if boundaries is None else boundaries
    heads, T = Hkv if per_head else 1, boundaries[-1]
    pq_k, codes_k = random_side(*keys, heads, heads if mapped else 0, B, Hkv, T)
    pq_v, codes_v = random_side(*values, heads, heads if mapped else 0, B, Hkv, T)
    exact_k, exact_v = torch.randn(2, B, Hkv, T - boundaries[0] + exact, D, dtype=torch.float64).to(dtype)
    query = torch.randn(B, Hkv * G, N, D, dtype=torch.float64).to(dtype)
    readers = reader(codes_k, pq_k.spec), reader(codes_v, pq_v.spec)
    return Case(
        query,
        (*readers, pq_k, pq_v, exact_k, exact_v),
        decoded(codes_k, pq_k),
        decoded(codes_v, pq_v),
        exact_k,
        exact_v,
        boundaries,
    )


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Rows whose definition is NaN (nothing to see) only have to be finite."""
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs()
    assert (error.nan_to_num(0) <= tolerance).all(), error


@st.composite
def cases(draw) -> tuple[Case, dict]:
    B, Hkv, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    N = draw(st.sampled_from([1, 1, 2, 7]))
    boundaries = sorted(draw(st.lists(st.integers(0, 40), min_size=N, max_size=N)))
    case = make_case(
        B=B,
        Hkv=Hkv,
        G=G,
        N=N,
        boundaries=boundaries,
        exact=N + draw(st.integers(0, 9)),
        keys=(draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([1, 4, 8, 9]))),
        values=(draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 8, 10]))),
        per_head=draw(st.booleans()),
        mapped=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    length = boundaries[0] + case.exact_k.shape[2]
    options: dict = {"scale": draw(st.sampled_from([0.3, 1.0]))}
    kind = draw(st.sampled_from(["causal", "bool", "additive"]))
    if kind != "causal":
        heads = draw(st.sampled_from([1, Hkv * G]))
        seen = torch.rand(draw(st.sampled_from([1, B])), heads, N, length + 3) < 0.7
        least = draw(st.sampled_from([-torch.inf, torch.finfo(torch.float64).min]))
        options["mask"] = (
            seen if kind == "bool" else torch.randn(seen.shape).double().masked_fill(~seen, least)
        )
    if draw(st.booleans()):
        options["softcap"] = 2.0
    if draw(st.booleans()):
        options["sinks"] = 3 * torch.randn(Hkv * G)
    if draw(st.booleans()):
        options["first_valid"] = torch.randint(0, length + 1, (B,))
    return case, options


@examples(120)
@given(cases())
def test_equals_the_definition(drawn):
    case, options = drawn
    assert_equal(case.run(**options), case.define(**options))


@pytest.mark.parametrize("N", [1, 70])
@pytest.mark.parametrize("masked", [False, True])
def test_many_spans_and_row_blocks_change_nothing(N, masked, monkeypatch):
    boundaries = [300 + 16 * (i // 2) for i in range(N)]
    case = make_case(B=1, N=N, boundaries=boundaries, exact=300)
    options: dict = {"scale": 0.4, "first_valid": torch.tensor([290])}
    if masked:
        options["mask"] = torch.rand(1, 1, N, boundaries[-1] + 300) < 0.5
    seen = []
    add = reference.OnlineSoftmax.add

    def spy(self, rows, scores, values):
        seen.append(scores.numel())
        add(self, rows, scores, values)

    monkeypatch.setattr(reference.OnlineSoftmax, "add", spy)
    whole = case.run(**options)
    calls = len(seen)
    seen.clear()
    monkeypatch.setattr(reference, "SPAN_ELEMENTS", {"cpu": 256 * 2 * D})
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", {"cpu": 16 * 4 * 256})
    pieces = case.run(**options)
    assert max(seen) <= 16 * 4 * 256  # scores alive at once
    assert len(seen) > calls
    assert_equal(pieces, whole)
    assert_equal(pieces, case.define(**options))


def test_one_query_never_decodes_keys(monkeypatch):
    decoded_sides = []
    decode = reference.decode
    monkeypatch.setattr(
        reference,
        "decode",
        lambda codes, pq, *a, **k: (decoded_sides.append(pq), decode(codes, pq, *a, **k))[1],
    )
    case = make_case(N=1)
    case.run(scale=1.0)
    assert decoded_sides == [case.positional[3]]


def test_values_equal_probabilities_summed_into_centroids():
    """The other form of the values' part: o_m = sum_c (sum of p over the tokens of code c) centroid[m, c]."""
    case = make_case(B=1, Hkv=1, G=1, N=1, boundaries=[40], mapped=False)
    _, value_codes, _, pq, _, _ = case.positional
    k = torch.cat([case.coded_k, case.exact_k], dim=2)[0, 0]
    p = (k @ case.query[0, 0, 0]).softmax(0)
    buckets = torch.zeros(pq.spec.M, pq.spec.C, dtype=torch.float64)
    for t, row in enumerate(value_codes.read(0, 40)[0, 0].tolist()):
        for m, code in enumerate(row):
            buckets[m, code] += p[t]
    o = torch.einsum("mc,mcd->md", buckets, pq.centroids[0].double()).flatten() + p[40:] @ case.exact_v[0, 0]
    assert_equal(case.run(scale=1.0)[0, 0, 0], o)


@pytest.mark.parametrize("N", [1, 3])
def test_additive_minimum_in_half_precision_hides_tokens(N):
    case = make_case(N=N, dtype=torch.float16)
    seen = torch.rand(2, 1, N, 25) < 0.6
    least = torch.zeros(2, 1, N, 25, dtype=torch.float16).masked_fill(~seen, torch.finfo(torch.float16).min)
    torch.testing.assert_close(case.run(scale=1.0, mask=least), case.run(scale=1.0, mask=seen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("N", [1, 9])
@pytest.mark.parametrize("scale", [0.35, 30.0])
def test_low_precision_is_rounded_once(dtype, N, scale):
    """Scores and sums are float32: the error is the output's rounding plus float32's, at large scores too."""
    case = make_case(N=N, exact=9, dtype=dtype)
    out = case.run(scale=scale)
    assert out.dtype == dtype
    expected = case.define(scale=scale)
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-5 * max(1.0, scale)
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("coded", [True, False])
def test_one_dominant_key(coded):
    case = make_case(B=1, Hkv=1, G=1, N=1, mapped=False)
    case.exact_k.mul_(0.01 if coded else 100)
    case.query.mul_(1e4)
    winner = (torch.cat([case.coded_k, case.exact_k], 2)[0, 0] @ case.query[0, 0, 0]).argmax()
    assert (winner < 20) == coded
    values = torch.cat([case.coded_v, case.exact_v], 2)[0, 0]
    assert_equal(case.run(scale=1.0)[0, 0, 0], values[winner])


def test_queries_that_see_nothing_are_finite():
    case = make_case(N=3)
    nothing = torch.zeros(2, 1, 3, 25, dtype=torch.bool)
    for options in (
        {"mask": nothing},
        {"first_valid": torch.tensor([25, 25])},
        {"mask": nothing.double() - torch.inf},
    ):
        assert case.run(scale=1.0, **options).isfinite().all()
