"""The allocation of bits against brute force, and the codebooks that it mixes."""

from itertools import product

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli.errors import UserError
from million_cli.pq import Setup, decode, encode, train_codebook
from million_cli.pq.budget import allocate
from million_cli.spec import CodeSpec, ModelFingerprint, PQSpec

L, HKV, N, D = 3, 2, 1500, 8
WIDE, NARROW = CodeSpec(D, 4, 5), CodeSpec(D, 2, 5)  # 2.5 and 1.25 bits
FINGERPRINT = ModelFingerprint("llama", L, (0, 1, 2), HKV, D, "abc")
CARD = {"calibration": "noise", "calibration_sha256": "0" * 64, "tokens": 1000}
BOTH = ("quantizer.{}.rotation=opq", "quantizer.{}.metric=fisher", "quantizer.{}.nbits=5")
FISHER = Setup().override(
    *(setting.format(side) for setting in BOTH for side in ("keys", "values")),
    "quantizer.keys.dsub=2",
    "quantizer.values.dsub=4",
    "quantizer.widths=[2,4]",
    "train.iterations=5",
    "train.held_out=0",
)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.integers(0, 30),
)
def test_no_choice_within_the_budget_costs_less(costs, sizes, budget):
    choices = list(product(range(3), repeat=len(costs)))
    within = [c for c in choices if sum(sizes[j] for j in c) <= budget]
    if not within:
        with pytest.raises(UserError, match="below the smallest choice"):
            allocate(costs, sizes, budget)
        return
    found = allocate(costs, sizes, budget)
    assert sum(sizes[j] for j in found) <= budget
    best = min(sum(costs[i][j] for i, j in enumerate(c)) for c in within)
    assert sum(costs[i][j] for i, j in enumerate(found)) == best


def train(bits, weights, scope="head", **options):
    """A codebook within `bits`, of noise whose errors weigh `weights` [2][L] (keys, values; by layer)."""
    x = torch.randn(2, L, HKV, N, D, generator=torch.Generator().manual_seed(0))
    F = torch.tensor(weights)[..., None, None, None] * torch.eye(D).expand(2, L, HKV, D, D)
    setup = FISHER.override(f"quantizer.bits={bits}", f"quantizer.scope={scope}")
    codebook = train_codebook(*x, FINGERPRINT, setup, information=(F[0], F[1]), **options, **CARD)
    return x, codebook


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_the_bits_go_where_errors_weigh_most(scope):
    x, codebook = train(1.25 * 4 / 3, [[1.0, 9.0, 2.0], [1.0, 1.0, 8.0]], scope)
    assert [spec.M for spec in codebook.keys.specs] == [2, 4, 2]
    assert [spec.M for spec in codebook.values.specs] == [2, 2, 4]
    assert codebook.bits_per_element == pytest.approx(1.25 * 4 / 3)
    for samples, side, errors in zip(
        x, (codebook.keys, codebook.values), (codebook.meta.key_error, codebook.meta.value_error), strict=True
    ):
        for i in range(L):
            pq = side.layer(i)
            error = (samples[i : i + 1] - decode(encode(samples[i : i + 1], pq), pq, torch.float32)).square()
            expected = error.mean((0, 2, 3)) / (samples[i] - samples[i].mean(1, keepdim=True)).square().mean(
                (1, 2)
            )
            torch.testing.assert_close(torch.tensor(errors[i]), expected, rtol=1e-4, atol=0)


def test_what_is_measured_corrects_what_is_predicted():
    asked = []

    def measure(side, layer, pq):
        asked.append((side, layer, pq.spec))
        return 1.0 if (side, layer) == ("values", 1) else 0.001

    _, codebook = train(1.25 * 7 / 6, [[1.0, 9.0, 2.0], [1.0, 1.0, 8.0]], measure=measure)
    assert asked == [(side, i, WIDE) for side in ("keys", "values") for i in range(L)]
    assert [spec.M for spec in codebook.keys.specs] == [2, 2, 2]
    assert [spec.M for spec in codebook.values.specs] == [2, 4, 2]


def test_a_layer_that_measures_nothing_is_left_as_predicted():
    _, codebook = train(1.25 * 7 / 6, [[1.0, 9.0, 2.0], [1.0, 1.0, 8.0]], measure=lambda *_: 0.0)
    assert [spec.M for spec in codebook.keys.specs] == [2, 4, 2]


def test_the_work_is_announced_and_done():
    seen = []
    train(2.0, [[1.0] * L] * 2, progress=lambda done, total: seen.append((done, total)))
    probes = 2 * L * HKV * (WIDE.M + NARROW.M)
    assert seen[0][1] == probes
    assert seen[-1][0] == seen[-1][1] > probes
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@examples(5)
@given(st.floats(1.25, 2.5))
def test_any_budget_is_kept_and_used(bits):
    _, codebook = train(bits, [[1.0, 9.0, 2.0], [1.0, 1.0, 8.0]])
    assert bits - 1.25 / 6 < codebook.bits_per_element <= bits + 1e-6


def test_without_information_the_budget_is_as_the_sides_say():
    x = torch.randn(2, L, HKV, 100, D)
    codebook = train_codebook(*x, FINGERPRINT, FISHER.override("quantizer.bits=2"), **CARD)
    assert codebook.specs == (PQSpec(WIDE, NARROW),) * L
    quantizer = codebook.meta.recipe.quantizer
    assert (quantizer.keys.metric, quantizer.values.metric, quantizer.bits) == (
        "euclidean",
        "euclidean",
        None,
    )


def test_refusals():
    with pytest.raises(UserError, match=r"bits=3: accepted are 1\.25 to 2\.5"):
        train(3.0, [[1.0] * L] * 2)
    with pytest.raises(UserError, match="accepted scopes are layer and head"):
        train(2.0, [[1.0] * L] * 2, "merged")
