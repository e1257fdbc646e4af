"""The codebook: centroids and transforms of a model's keys and values, with a card that says their origin.

One safetensors file: `keys.centroids.<i>` of each layer (of the 0th alone if all layers share them),
`keys.encode` and `keys.decode`, the same for `values`, float32; `keys.frequencies`, float64, where keys are
coded relative to the origin of their block (see `pq.rebase`); the card as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.files import read_safetensors, write_safetensors
from million_cli.pq.rebase import LAYOUTS, Rebase
from million_cli.pq.transform import Transform, transform_dtype
from million_cli.recipe import Recipe
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint, PQSpec, Scope

FORMAT = "million-codebook"
FORMAT_VERSION = 5  # 4: a hash of card and tensors; 5: keys relative to the origin of their block
SIDES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class LayerPQ:
    """The quantizer of one side of one layer.

    centroids: [Hc, M, C, dsub]; transform: maps [Ht, D, D] or None; Hc and Ht in {1, Hkv}; rebase: brings
    keys to the origin of their block before all else, or None.
    """

    spec: CodeSpec
    centroids: Tensor
    transform: Transform | None = None
    rebase: Rebase | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        assert self.centroids.shape[1:] == (spec.M, spec.C, spec.dsub), (self.centroids.shape, spec)
        assert self.transform is None or self.transform.encode.shape[1:] == (spec.head_dim, spec.head_dim)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerPQ:
        """Moved to `device`, centroids in `dtype`, the transform as `Transform.to` says."""
        transform = self.transform and self.transform.to(device, dtype or self.centroids.dtype)
        return LayerPQ(self.spec, self.centroids.to(device=device, dtype=dtype), transform, self.rebase)


@dataclass(frozen=True, eq=False)
class ProductQuantizer:
    """One side (keys or values) of all layers.

    specs: the codes of each layer; layers may differ in M and nbits unless the scope is merged.
    centroids: float32 [Hc, M, C, dsub] of each layer, or once for all (merged); Hc is 1 unless scope is head.
    transform: float32 maps [Lt, Ht, D, D] or None, Lt in {1, L}, Ht in {1, Hkv}.
    rebases: of each layer, see `LayerPQ`; empty if no layer has one.
    """

    specs: tuple[CodeSpec, ...]
    scope: Scope
    centroids: tuple[Tensor, ...]
    transform: Transform | None = None
    rebases: tuple[Rebase | None, ...] = ()

    def __post_init__(self) -> None:
        merged = self.scope == "merged"
        assert len(self.centroids) == (1 if merged else len(self.specs)), (len(self.centroids), self.scope)
        assert not merged or len(set(self.specs)) == 1, self.specs
        for spec, centroids in zip(self.specs, self.centroids, strict=not merged):
            assert centroids.shape[1:] == (spec.M, spec.C, spec.dsub), (centroids.shape, spec)
            assert centroids.shape[0] == 1 or self.scope == "head", centroids.shape
        D = self.specs[0].head_dim
        assert self.transform is None or self.transform.encode.shape[2:] == (D, D)
        assert len(self.rebases) in (0, len(self.specs)), len(self.rebases)

    def layer(self, i: int) -> LayerPQ:
        """The quantizer of the i-th layer of the codebook (its position, not the model's layer index)."""
        centroids = self.centroids[i if len(self.centroids) > 1 else 0]
        rebase = self.rebases[i] if self.rebases else None
        return LayerPQ(self.specs[i], centroids, self.transform and self.transform.layer(i), rebase)

    def size_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the centroids in `dtype` and of the transforms in the dtype `LayerPQ.to` gives them."""
        size = sum(centroids.numel() for centroids in self.centroids) * dtype.itemsize
        if self.transform is not None:
            size += self.transform.num_elements * transform_dtype(dtype).itemsize
        return size


@dataclass(frozen=True)
class CodebookMeta:
    """The codebook's card.

    calibration: the text of the samples, in words; calibration_sha256: its hash;
    tokens: tokens read from it; samples: vectors a layer and head that trained the codebook;
    held_out: further vectors, on which its errors are measured (0: on the training samples);
    seed: of every random choice; recipe: as carried out: without Fisher information its metrics are
    euclidean, its weighting is none, and it has no budget of bits;
    key_error, value_error: [L][Hkv] mean squared error over variance;
    key_predicted_kl, value_predicted_kl: [L][Hkv], see `train.TrainedSide`; empty without Fisher information;
    positions: how many positions the codes were made for, counted from the start of the text; None: any, as
    keys are coded relative to the origin of their block;
    command, commit: what made it, where that is known.
    """

    fingerprint: ModelFingerprint
    calibration: str
    calibration_sha256: str
    tokens: int
    samples: int
    held_out: int
    seed: int
    recipe: Recipe
    key_error: list[list[float]]
    value_error: list[list[float]]
    positions: int | None = None
    key_predicted_kl: list[list[float]] = field(default_factory=list)
    value_predicted_kl: list[list[float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    commit: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodebookMeta:
        parts = {"fingerprint": ModelFingerprint.from_dict, "recipe": Recipe.from_dict}
        return cls(**{**values, **{name: read(values[name]) for name, read in parts.items()}})


@dataclass(frozen=True, eq=False)
class Codebook:
    """Quantizers of keys and values, and their card."""

    keys: ProductQuantizer
    values: ProductQuantizer
    meta: CodebookMeta

    @property
    def specs(self) -> tuple[PQSpec, ...]:
        """The codes of each layer."""
        return tuple(PQSpec(*sides) for sides in zip(self.keys.specs, self.values.specs, strict=True))

    @property
    def bits_per_element(self) -> float:
        """Mean code bits per element over keys and values of all layers, which are of one shape."""
        return fmean(spec.bits_per_element for spec in self.specs)

    @property
    def num_layers(self) -> int:
        """Layers it quantizes: the full-attention layers of its model."""
        return len(self.meta.fingerprint.layers)

    def size_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the tables take on a device when the centroids are held in `dtype`."""
        return self.keys.size_bytes(dtype) + self.values.size_bytes(dtype)

    def check(self, fingerprint: ModelFingerprint) -> None:
        """Check that the codebook was trained for the model of `fingerprint`.

        Raises:
            UserError: the fingerprints differ; the line names each field, the codebook's value first.
        """
        differences = self.meta.fingerprint.differences(fingerprint)
        if differences:
            raise UserError(
                f"the codebook belongs to another model (codebook != model): {'; '.join(differences)}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the codebook to `path`, atomically; equal codebooks give equal bytes.

        Raises:
            UserError: the codebook holds NaN or infinity, or the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        sides: dict[str, dict[str, Any]] = {}
        for name, side in zip(SIDES, (self.keys, self.values), strict=True):
            for i, centroids in enumerate(side.centroids):
                tensors[f"{name}.centroids.{i}"] = centroids
            if side.transform is not None:
                tensors[f"{name}.encode"] = side.transform.encode.contiguous()
                tensors[f"{name}.decode"] = side.transform.decode.contiguous()
            sides[name] = {"specs": [asdict(spec) for spec in side.specs], "scope": side.scope}
            if any(side.rebases):
                sides[name]["rebases"], tensors[f"{name}.frequencies"] = _rebases_to_card(side.rebases)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"codebook {path}: {name} holds NaN or infinity; it is not written")
        card = json.dumps({"version": FORMAT_VERSION, **sides, "meta": self.meta.to_dict()}, sort_keys=True)
        content = content_hash(card, tensors)
        write_safetensors(path, tensors, {"format": FORMAT, "card": card, "sha256": content})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebook:
        """Read a codebook onto the CPU.

        Raises:
            UserError: the file is missing, is no codebook, has another format version, or does not fit its
                own card or hash.
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
            raise UserError(
                f"codebook {path} has format version {version}; accepted is {FORMAT_VERSION}: train it again"
            )
        try:
            meta = CodebookMeta.from_dict(card["meta"])
            specs = {name: tuple(CodeSpec(**spec) for spec in card[name]["specs"]) for name in SIDES}
            scopes = {name: card[name]["scope"] for name in SIDES}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"codebook {path} has a damaged card: {_one_line(error)}") from error
        keys, values = (
            _load_side(
                path, name, tensors, specs[name], scopes[name], card[name].get("rebases"), meta.fingerprint
            )
            for name in SIDES
        )
        if metadata.get("sha256") != content_hash(metadata["card"], tensors):
            raise UserError(f"codebook {path} is damaged: its content is not what was saved (SHA-256)")
        return cls(keys, values, meta)


def content_hash(card: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a card and of names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(card.encode("utf-8"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_side(
    path: str | os.PathLike[str],
    name: str,
    tensors: dict[str, Tensor],
    specs: tuple[CodeSpec, ...],
    scope: Scope,
    rebases_card: Any,
    fingerprint: ModelFingerprint,
) -> ProductQuantizer:
    def damaged(what: str) -> UserError:
        return UserError(f"codebook {path} is damaged: {name}: {what}")

    L, Hkv, D = len(fingerprint.layers), fingerprint.num_kv_heads, fingerprint.head_dim
    if scope not in SCOPES:
        raise damaged(f"scope={scope!r}, accepted are {', '.join(SCOPES)}")
    if len(specs) != L:
        raise damaged(f"{len(specs)} layers, but the model has {L}")
    if scope == "merged" and len(set(specs)) != 1:
        raise damaged("layers that share centroids have different codes")
    for spec in specs:
        if spec.head_dim != D:
            raise damaged(f"head_dim={spec.head_dim}, but the model has {D}")
    tables = {f"centroids.{i}": specs[i] for i in range(1 if scope == "merged" else L)}
    missing = [label for label in tables if f"{name}.{label}" not in tensors]
    if missing:
        raise damaged(f"{missing[0]} are missing")
    centroids = tuple(tensors[f"{name}.{label}"] for label in tables)
    maps = {
        label: tensors[f"{name}.{label}"] for label in ("encode", "decode") if f"{name}.{label}" in tensors
    }
    for label, tensor in {**dict(zip(tables, centroids, strict=True)), **maps}.items():
        if not (tensor.dtype == torch.float32 and bool(tensor.isfinite().all())):
            raise damaged(f"{label} are not finite float32 numbers")
    for (label, spec), tensor in zip(tables.items(), centroids, strict=True):
        expected = (Hkv if scope == "head" else 1, spec.M, spec.C, spec.dsub)
        if tuple(tensor.shape) != expected:
            raise damaged(f"{label} have shape {list(tensor.shape)}, expected {list(expected)}")
    rebases: tuple[Rebase | None, ...] = ()
    if rebases_card is not None:
        try:
            rebases = _rebases_from_card(rebases_card, tensors[f"{name}.frequencies"], D)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise damaged(f"rebases: {_one_line(error)}") from error
        if len(rebases) != L:
            raise damaged(f"rebases of {len(rebases)} layers, but the model has {L}")
    if not maps:
        return ProductQuantizer(specs, scope, centroids, rebases=rebases)
    if len(maps) == 1:
        raise damaged(f"{next(iter(maps))} is there without its inverse")
    for label, tensor in maps.items():
        shape = tuple(tensor.shape)
        if len(shape) != 4 or shape[0] not in (1, L) or shape[1] not in (1, Hkv) or shape[2:] != (D, D):
            raise damaged(f"{label} has shape {list(shape)}, expected [1 or {L}, 1 or {Hkv}, {D}, {D}]")
    if maps["encode"].shape != maps["decode"].shape:
        raise damaged("encode and decode differ in shape")
    return ProductQuantizer(specs, scope, centroids, Transform(**maps), rebases)


def _rebases_to_card(rebases: tuple[Rebase | None, ...]) -> tuple[list[Any], Tensor]:
    """For each layer None or [tokens a block, layout, scale, row of the tensor]; layers share equal rows."""
    rows: list[Tensor] = []
    card: list[Any] = []
    for rebase in rebases:
        if rebase is None:
            card.append(None)
            continue
        at = next((i for i, row in enumerate(rows) if torch.equal(row, rebase.frequencies)), len(rows))
        if at == len(rows):
            rows.append(rebase.frequencies)
        card.append([rebase.every, rebase.layout, rebase.scale, at])
    return card, torch.stack(rows)


def _rebases_from_card(card: list[Any], frequencies: Tensor, head_dim: int) -> tuple[Rebase | None, ...]:
    """The inverse of `_rebases_to_card`; ValueError, TypeError or IndexError where it cannot be."""
    if frequencies.dtype != torch.float64 or not bool(frequencies.isfinite().all()):
        raise ValueError("frequencies are not finite float64 numbers")
    if not 0 < 2 * frequencies.shape[1] <= head_dim:
        raise ValueError(f"{frequencies.shape[1]} frequencies for head_dim={head_dim}")
    rebases: list[Rebase | None] = []
    for entry in card:
        if entry is None:
            rebases.append(None)
            continue
        every, layout, scale, row = entry
        if every < 1 or layout not in LAYOUTS or row < 0 or not 0 < scale < float("inf"):
            raise ValueError(f"{entry}")
        rebases.append(Rebase(int(every), frequencies[row], layout, float(scale)))
    return tuple(rebases)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
