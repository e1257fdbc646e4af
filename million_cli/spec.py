"""Shapes of codes, windows and models, shared by all modules.  No tensors here.

Letters used everywhere: B batch, Hq/Hkv query and key/value heads, G = Hq / Hkv, T tokens, D head_dim,
M subspaces, C = 2**nbits centroids a subspace, dsub = D / M, P page size, R residual window, S splits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from million_cli.errors import UserError

Scope = Literal["merged", "layer", "head"]
SCOPES: tuple[Scope, ...] = ("merged", "layer", "head")


@dataclass(frozen=True)
class CodeSpec:
    """Shape of the codes of one side (keys or values): D split into M subspaces of nbits each.

    Raises:
        UserError: M does not divide head_dim, or nbits is outside 1..16.
    """

    head_dim: int
    M: int
    nbits: int

    def __post_init__(self) -> None:
        if not 1 <= self.nbits <= 16:
            raise UserError(f"nbits={self.nbits}: a code has 1 to 16 bits")
        if self.M < 1 or self.head_dim % self.M:
            divisors = [m for m in range(1, self.head_dim + 1) if self.head_dim % m == 0]
            raise UserError(f"M={self.M} does not divide head_dim={self.head_dim}; accepted: {divisors}")

    @property
    def dsub(self) -> int:
        """Dimensions of a subspace."""
        return self.head_dim // self.M

    @property
    def C(self) -> int:  # noqa: N802 - the field's letter
        """Centroids of a subspace."""
        return 1 << self.nbits

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one token and head: bit-packed, the row padded to whole bytes."""
        return (self.M * self.nbits + 7) // 8

    @property
    def bits_per_element(self) -> float:
        """Code bits per element of the vector: nbits / dsub."""
        return self.M * self.nbits / self.head_dim


@dataclass(frozen=True)
class PQSpec:
    """Codes of keys and of values, independent of each other."""

    keys: CodeSpec
    values: CodeSpec

    def __post_init__(self) -> None:
        assert self.keys.head_dim == self.values.head_dim

    @property
    def bits_per_element(self) -> float:
        """Mean code bits per element over keys and values."""
        return (self.keys.bits_per_element + self.values.bits_per_element) / 2


@dataclass(frozen=True)
class WindowSpec:
    """Pages of P coded tokens, followed by a residual window of fewer than R exact tokens.

    When the window holds R tokens, its oldest P are encoded.  After any append it therefore holds R - P to
    R - 1 tokens (fewer while the text is shorter than R - P).

    Raises:
        UserError: page_size is not a multiple of 16 in 16..256, or residual is not a multiple of page_size
            larger than it.
    """

    page_size: int = 64
    residual: int = 128

    def __post_init__(self) -> None:
        if self.page_size % 16 or not 16 <= self.page_size <= 256:
            raise UserError(f"page_size={self.page_size}: accepted are multiples of 16 from 16 to 256")
        if self.residual % self.page_size or self.residual <= self.page_size:
            raise UserError(
                f"extended_residual={self.residual}: accepted are multiples of page_size={self.page_size} "
                f"from {2 * self.page_size}"
            )

    def coded_length(self, length: int) -> int:
        """Number of tokens that are codes, the oldest ones, after `length` tokens have been appended.

        Example: P=64, R=128: 127 -> 0, 128 -> 64, 191 -> 64, 192 -> 128.
        """
        return max(0, length - (self.residual - self.page_size)) // self.page_size * self.page_size


@dataclass(frozen=True)
class ModelFingerprint:
    """Identity of a model; a codebook serves only models with its own fingerprint.

    `layers` are the indices of the full-attention layers (sliding-window layers keep dense caches);
    `weights` is a digest of the key and value projections, `rope_theta` the base of the rotary embedding,
    None where there is none (see `hf.models.fingerprint`).
    """

    model_type: str
    num_layers: int
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    weights: str
    rope_theta: float | None = None

    def differences(self, other: ModelFingerprint) -> list[str]:
        """One line for each field that differs, with both values; empty if they agree."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} != {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelFingerprint:
        return cls(**{**values, "layers": tuple(values["layers"])})
