"""Orthogonal rotations applied before the split into subspaces, as matrices R [D, D] with x_rot = x @ R.

A method is one function in `METHODS`: it takes the vectors of one side, their codes and the setup, and
returns [Lr, Hr, D, D] with Lr in {1, L} and Hr in {1, Hkv}, or None for no rotation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from million_cli.errors import check
from million_cli.pq.metric import metric_root
from million_cli.pq.opq import optimised_rotation
from million_cli.pq.samples import LayerSamples, Mapped, Thinned, layers
from million_cli.pq.setup import Setup
from million_cli.pq.transform import Transform
from million_cli.recipe import ROTATIONS
from million_cli.spec import CodeSpec

RotationMethod = Callable[[LayerSamples, CodeSpec, Setup], Tensor | None]


def fit_rotation(method: str, samples: LayerSamples, spec: CodeSpec, setup: Setup) -> Tensor | None:
    """Fit the rotation of `method` to samples: float32 [Lr, Hr, D, D] on the CPU, or None.

    Raises:
        UserError: an unknown method.
    """
    check("rotation", method, ROTATIONS)
    return METHODS[method](samples, spec, setup)


def fit_transform(
    method: str, samples: LayerSamples, spec: CodeSpec, setup: Setup, information: Tensor | None = None
) -> Transform | None:
    """Fit the rotation of `method` in the metric of `information`: float32 maps on the CPU, or None.

    information: Fisher information F [L, Hkv, D, D] of the vectors (see `pq.metric`); None for the plain
    squared error.  With F the transform is F^(1/2) R, R fitted to the samples times F^(1/2).

    Raises:
        UserError: an unknown method.
    """
    if information is None:
        R = fit_rotation(method, samples, spec, setup)
        return None if R is None else Transform.rotation(R)
    root, inverse = metric_root(information)
    R = fit_rotation(method, Mapped(samples, root.float().to(setup.device)), spec, setup)
    if R is None:
        return Transform(root.float(), inverse.float())
    R = R.double()
    return Transform((root @ R).float(), (R.mT @ inverse).float())


def random_hadamard(D: int, seed: int) -> Tensor:
    """A random orthogonal matrix that spreads each dimension over all: float64 [D, D].

    D = 2^a * m with m odd: diag(random signs) (H_{2^a} / sqrt(2^a) (x) Q_m), H the Sylvester-Hadamard matrix
    and Q_m a random orthogonal matrix (1 for m = 1); QuIP# (arXiv:2402.04396, section 3) uses the same form.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (D,), generator=generator).double() * 2 - 1
    matrix = random_orthogonal(D // (D & -D), generator)
    while matrix.shape[0] < D:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return signs[:, None] * matrix


def random_orthogonal(D: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix (QR of a Gaussian one, signs fixed): float64 [D, D]."""
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _none(samples: LayerSamples, spec: CodeSpec, setup: Setup) -> Tensor | None:
    return None


def _hadamard(samples: LayerSamples, spec: CodeSpec, setup: Setup) -> Tensor | None:
    return random_hadamard(spec.head_dim, setup.seed).float()[None, None]


def _opq(samples: LayerSamples, spec: CodeSpec, setup: Setup) -> Tensor | None:
    """One rotation a layer and head; heads that share centroids are fitted together."""
    scope = setup.recipe.quantizer.scope
    thinned = Thinned(samples, setup.max_samples(spec.C), setup.seed)

    def rotations(heads: Tensor) -> Tensor:
        return optimised_rotation(
            heads.to(setup.device),
            spec,
            shared=scope != "head",
            alternations=setup.recipe.train.alternations,
            seed=setup.seed,
        ).cpu()

    if scope == "merged":
        together = torch.stack(list(layers(thinned)))
        return rotations(together.flatten(0, 1)).unflatten(0, together.shape[:2])
    return torch.stack([rotations(layer) for layer in layers(thinned)])


METHODS: dict[str, RotationMethod] = {"none": _none, "hadamard": _hadamard, "opq": _opq}
