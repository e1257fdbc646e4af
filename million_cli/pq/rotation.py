"""Orthogonal rotations applied before the split into subspaces.

Convention: a rotation is a tensor R [D, D] with orthonormal rows, and x_rot = x @ R.  Rotating queries and
keys alike leaves scores unchanged, (q R)(k R)^T = q k^T; rotated values are undone once on the attention
output, o = o_rot @ R^T.  RoPE comes first: what is rotated is what the cache stores.

A method is one function in `ROTATIONS`: it sees the samples [L, Hkv, n, D] of one side and the circumstances
(`Fit`), and returns [Lr, Hr, D, D] with Lr in {1, L} and Hr in {1, Hkv}, or None for no rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.opq import optimised_rotation
from million_cli.spec import CodeSpec, Scope


@dataclass(frozen=True)
class Fit:
    """What a rotation is fitted for.

    scope: which layers and heads share centroids; alternations: with k-means, if the method has them;
    max_samples: a head is represented by at most that many samples, chosen at random; device: where it runs.
    """

    scope: Scope = "head"
    alternations: int = 0
    max_samples: int = 1 << 16
    seed: int = 0
    device: str = "cpu"


RotationMethod = Callable[[Tensor, CodeSpec, Fit], Tensor | None]


def rotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    """x [B, H, T, D] @ rotation [Hr, D, D], Hr in {1, H}, in the dtype of x; x itself if there is none."""
    return x if rotation is None else x @ rotation.to(x.dtype)


def unrotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    """The inverse of `rotate`: x [B, H, T, D] @ rotation^T."""
    return x if rotation is None else x @ rotation.to(x.dtype).transpose(-1, -2)


def fit_rotation(method: str, samples: Tensor, spec: CodeSpec, fit: Fit) -> Tensor | None:
    """The rotation that `method` makes for samples [L, Hkv, n, D]: float32 [Lr, Hr, D, D] on the CPU or None.

    Raises:
        UserError: an unknown method.
    """
    if method not in ROTATIONS:
        raise UserError(f"rotation={method}: accepted are {', '.join(ROTATIONS)}")
    return ROTATIONS[method](samples, spec, fit)


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


def _none(samples: Tensor, spec: CodeSpec, fit: Fit) -> Tensor | None:
    return None


def _hadamard(samples: Tensor, spec: CodeSpec, fit: Fit) -> Tensor | None:
    return random_hadamard(spec.head_dim, fit.seed).float()[None, None]


def _opq(samples: Tensor, spec: CodeSpec, fit: Fit) -> Tensor | None:
    """One rotation a layer and head, in the light of who shares its centroids."""
    L, Hkv, n, _ = samples.shape
    if n > fit.max_samples:
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(fit.seed))[: fit.max_samples]
        samples = samples[:, :, rows.to(samples.device)]

    def rotations(heads: Tensor) -> Tensor:
        return optimised_rotation(
            heads.to(fit.device),
            spec,
            shared=fit.scope != "head",
            alternations=fit.alternations,
            seed=fit.seed,
        ).cpu()

    if fit.scope == "merged":
        return rotations(samples.flatten(0, 1)).unflatten(0, (L, Hkv))
    return torch.stack([rotations(layer) for layer in samples])


ROTATIONS: dict[str, RotationMethod] = {"none": _none, "hadamard": _hadamard, "opq": _opq}
