"""The codebook: centroids and rotations of a model's keys and values, with a card that tells their origin.

One safetensors file: `keys.centroids`, `keys.rotation`, the same for `values`, float32; the card as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.files import read_safetensors, write_safetensors
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint, PQSpec, Scope

FORMAT = "million-codebook"
FORMAT_VERSION = 1
SIDES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class LayerPQ:
    """What codes of one side of one layer mean.

    centroids: [Hc, M, C, dsub]; rotation: [Hr, D, D] (x_rot = x @ R) or None; Hc and Hr in {1, Hkv}.
    """

    spec: CodeSpec
    centroids: Tensor
    rotation: Tensor | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        assert self.centroids.shape[1:] == (spec.M, spec.C, spec.dsub), (self.centroids.shape, spec)
        assert self.rotation is None or self.rotation.shape[1:] == (spec.head_dim, spec.head_dim)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerPQ:
        """Moved to `device`, centroids in `dtype`.

        The rotation keeps at least float32: rounded to 16 bits it would no longer be orthogonal.
        """
        rotation = self.rotation
        if rotation is not None:
            rotation = rotation.to(device=device, dtype=rotation_dtype(dtype or self.centroids.dtype))
        return LayerPQ(self.spec, self.centroids.to(device=device, dtype=dtype), rotation)


@dataclass(frozen=True, eq=False)
class ProductQuantizer:
    """One side (keys or values) of all layers.

    centroids: float32 [Lc, Hc, M, C, dsub], (Lc, Hc) = (1, 1) | (L, 1) | (L, Hkv) for merged | layer | head;
    rotation: float32 [Lr, Hr, D, D] or None, Lr in {1, L}, Hr in {1, Hkv}.
    """

    spec: CodeSpec
    scope: Scope
    centroids: Tensor
    rotation: Tensor | None = None

    def __post_init__(self) -> None:
        spec, (Lc, Hc, *table) = self.spec, self.centroids.shape
        assert table == [spec.M, spec.C, spec.dsub], (self.centroids.shape, spec)
        assert Lc == 1 or self.scope != "merged", self.centroids.shape
        assert Hc == 1 or self.scope == "head", self.centroids.shape
        assert self.rotation is None or self.rotation.shape[2:] == (spec.head_dim, spec.head_dim)

    def layer(self, i: int) -> LayerPQ:
        """The quantizer of the i-th layer of the codebook (its position, not the model's layer index)."""
        centroids = self.centroids[i if self.centroids.shape[0] > 1 else 0]
        rotation = self.rotation
        if rotation is not None:
            rotation = rotation[i if rotation.shape[0] > 1 else 0]
        return LayerPQ(self.spec, centroids, rotation)

    def size_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the centroids in `dtype` and of the rotations in the dtype `LayerPQ.to` gives them."""
        size = self.centroids.numel() * dtype.itemsize
        if self.rotation is not None:
            size += self.rotation.numel() * rotation_dtype(dtype).itemsize
        return size


@dataclass(frozen=True)
class CodebookMeta:
    """The codebook's card.

    calibration: what text the samples come from, in words; calibration_sha256: its hash;
    tokens: tokens read from it; samples: vectors a layer and head that trained the codebook;
    key_error, value_error: [L][Hkv] mean squared error over variance, on the training samples.
    """

    fingerprint: ModelFingerprint
    calibration: str
    calibration_sha256: str
    tokens: int
    samples: int
    seed: int
    trainer: str
    seeding: str
    iterations: int
    key_rotation: str
    value_rotation: str
    key_error: list[list[float]]
    value_error: list[list[float]]
    alternations: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fingerprint": self.fingerprint.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodebookMeta:
        return cls(**{**values, "fingerprint": ModelFingerprint.from_dict(values["fingerprint"])})


@dataclass(frozen=True, eq=False)
class Codebook:
    """Quantizers of keys and values, and their card."""

    keys: ProductQuantizer
    values: ProductQuantizer
    meta: CodebookMeta

    @property
    def spec(self) -> PQSpec:
        return PQSpec(self.keys.spec, self.values.spec)

    @property
    def num_layers(self) -> int:
        """Layers it quantizes: the full-attention layers of its model."""
        return len(self.meta.fingerprint.layers)

    def size_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the tables take on a device when the centroids are held in `dtype`."""
        return self.keys.size_bytes(dtype) + self.values.size_bytes(dtype)

    def check(self, fingerprint: ModelFingerprint) -> None:
        """Make sure that the codebook was trained for the model of `fingerprint`.

        Raises:
            UserError: naming every field that differs, with the codebook's value first.
        """
        differences = self.meta.fingerprint.differences(fingerprint)
        if differences:
            raise UserError(
                f"the codebook belongs to another model (codebook != model): {'; '.join(differences)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the codebook to `path`, atomically.

        Raises:
            UserError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        sides: dict[str, dict[str, Any]] = {}
        for name, side in zip(SIDES, (self.keys, self.values), strict=True):
            tensors[f"{name}.centroids"] = side.centroids
            if side.rotation is not None:
                tensors[f"{name}.rotation"] = side.rotation
            sides[name] = {**asdict(side.spec), "scope": side.scope}
        card = {"version": FORMAT_VERSION, **sides, "meta": self.meta.to_dict()}
        write_safetensors(path, tensors, {"format": FORMAT, "card": json.dumps(card)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebook:
        """Read a codebook onto the CPU.

        Raises:
            UserError: the file is missing, no codebook, of another version or does not fit its own card.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} is not a codebook: format={metadata.get('format')!r}, accepted is {FORMAT!r}"
            )
        try:
            card = json.loads(metadata["card"])
            version = card["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"codebook {path} has no readable card: {error}") from error
        if version != FORMAT_VERSION:
            raise UserError(f"codebook {path} has format version {version}; accepted is {FORMAT_VERSION}")
        try:
            meta = CodebookMeta.from_dict(card["meta"])
            specs = {name: CodeSpec(*(card[name][f] for f in ("head_dim", "M", "nbits"))) for name in SIDES}
            scopes = {name: card[name]["scope"] for name in SIDES}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"codebook {path} has a damaged card: {_one_line(error)}") from error
        keys, values = (
            _load_side(path, name, tensors, specs[name], scopes[name], meta.fingerprint) for name in SIDES
        )
        return cls(keys, values, meta)


def rotation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a rotation goes with centroids in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _load_side(
    path: str | os.PathLike[str],
    name: str,
    tensors: dict[str, Tensor],
    spec: CodeSpec,
    scope: Scope,
    fingerprint: ModelFingerprint,
) -> ProductQuantizer:
    def damaged(what: str) -> UserError:
        return UserError(f"codebook {path} is damaged: {name}: {what}")

    L, Hkv = len(fingerprint.layers), fingerprint.num_kv_heads
    centroids, rotation = tensors.get(f"{name}.centroids"), tensors.get(f"{name}.rotation")
    if scope not in SCOPES:
        raise damaged(f"scope={scope!r}, accepted are {', '.join(SCOPES)}")
    if spec.head_dim != fingerprint.head_dim:
        raise damaged(f"head_dim={spec.head_dim}, but the model has {fingerprint.head_dim}")
    if centroids is None:
        raise damaged("centroids are missing")
    for tensor, label in ((centroids, "centroids"), (rotation, "rotation")):
        if tensor is not None and not (tensor.dtype == torch.float32 and bool(tensor.isfinite().all())):
            raise damaged(f"{label} are not finite float32 numbers")
    expected = {"merged": (1, 1), "layer": (L, 1), "head": (L, Hkv)}[scope] + (spec.M, spec.C, spec.dsub)
    if tuple(centroids.shape) != expected:
        raise damaged(f"centroids have shape {list(centroids.shape)}, expected {list(expected)}")
    if rotation is not None:
        D, shape = spec.head_dim, tuple(rotation.shape)
        if len(shape) != 4 or shape[0] not in (1, L) or shape[1] not in (1, Hkv) or shape[2:] != (D, D):
            raise damaged(f"rotation has shape {list(shape)}, expected [1 or {L}, 1 or {Hkv}, {D}, {D}]")
    return ProductQuantizer(spec, scope, centroids, rotation)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
