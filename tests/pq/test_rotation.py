import pytest
import torch

from million_cli.errors import UserError
from million_cli.pq import Setup
from million_cli.pq.rotation import fit_rotation, random_hadamard, random_orthogonal
from million_cli.spec import CodeSpec


@pytest.mark.parametrize("D", [1, 2, 5, 64, 80, 96, 128])
def test_hadamard_is_orthogonal_and_seeded(D):
    R = random_hadamard(D, seed=3)
    assert R.dtype == torch.float64
    torch.testing.assert_close(R @ R.T, torch.eye(D, dtype=torch.float64), atol=1e-13, rtol=0)
    assert torch.equal(R, random_hadamard(D, seed=3))
    if D > 2:
        assert not torch.equal(R, random_hadamard(D, seed=4))


def test_hadamard_spreads_one_dimension_evenly():
    torch.testing.assert_close(random_hadamard(64, 0).abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))


def test_random_orthogonal_is_uniform_over_signs():
    """QR alone would fix the signs of the diagonal; of Haar's matrices half have a positive first entry."""
    generator = torch.Generator().manual_seed(0)
    positive = sum(bool(random_orthogonal(3, generator)[0, 0] > 0) for _ in range(200))
    assert 70 <= positive <= 130


def test_methods_by_name():
    samples = torch.randn(2, 3, 10, 16)
    spec = CodeSpec(16, 8, 4)
    assert fit_rotation("none", samples, spec, Setup()) is None
    R = fit_rotation("hadamard", samples, spec, Setup())
    assert R is not None
    assert (R.shape, R.dtype) == ((1, 1, 16, 16), torch.float32)
    with pytest.raises(UserError, match="rotation=haar: accepted are none, hadamard, opq"):
        fit_rotation("haar", samples, spec, Setup())
