"""Samples of keys and values, in memory for training and in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from million_cli.errors import UserError
from million_cli.files import read_safetensors
from million_cli.pq.samples import LayerSamples
from million_cli.spec import ModelFingerprint

MANIFEST = "manifest.json"
INFORMATION = "information"
_FIELDS = {
    **dict.fromkeys(("generation", "samples", "seed", "seen"), int),
    **dict.fromkeys(("fingerprint", "shards", "progress"), dict),
    "at_origin": bool,
}
FORMAT = 5  # 5: keys at position 0


@dataclass(frozen=True)
class Samples:
    """The samples that `SamplingCache.save` left in a folder, read a layer at a time.

    Raises:
        UserError: the folder holds no samples, or damaged ones.
    """

    folder: Path

    def __post_init__(self) -> None:
        if read_manifest(self.folder) is None:
            raise UserError(
                f"{self.folder}: no samples here (no {MANIFEST}); make some with `million sample`"
            )

    @property
    def manifest(self) -> dict[str, Any]:
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return manifest

    @property
    def fingerprint(self) -> ModelFingerprint:
        """The model that was sampled."""
        try:
            return ModelFingerprint.from_dict(self.manifest["fingerprint"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.folder}: the manifest's fingerprint is damaged: {error}") from error

    def shard(self, layer: int, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """A layer's reservoir state (all tensors, or those of `names`), by the model's layer index.

        Raises:
            UserError: the shard is missing or damaged.
        """
        shards = self.manifest["shards"]
        if str(layer) not in shards:
            raise UserError(f"{self.folder}: no samples of layer {layer}; remove the folder to sample again")
        return read_safetensors(self.folder / shards[str(layer)], names)[0]

    def layer(self, layer: int, side: str) -> torch.Tensor:
        """`keys` or `values` `[Hkv, n, D]` of a layer, or their squares, by the model's layer index.

        Raises:
            UserError: the shard is missing, damaged or holds NaN.
        """
        vectors = self.shard(layer, [side])[side]
        if not vectors.isfinite().all():
            raise UserError(
                f"{self.folder}: layer {layer}: the {side} hold NaN or infinity; sample them again"
            )
        return vectors

    def sides(self) -> tuple[SampledSide, SampledSide]:
        """Keys and values, each read a layer at a time when asked for."""
        layers = self.fingerprint.layers
        return SampledSide(self, layers, "keys"), SampledSide(self, layers, "values")

    def squares(self) -> tuple[SampledSide, SampledSide]:
        """Squared gradients of keys and of values, `[Hkv, n]` a layer; -1 where not known."""
        layers = self.fingerprint.layers
        return SampledSide(self, layers, "key_squares"), SampledSide(self, layers, "value_squares")

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[L, Hkv, n, D]`, L over the full-attention layers.

        Raises:
            UserError: as `layer`.
        """
        keys, values = (torch.stack([side[i] for i in range(len(side))]) for side in self.sides())
        return keys, values

    def information(self) -> dict[str, torch.Tensor] | None:
        """The `Information.state()` saved with the samples, if any.

        Raises:
            UserError: its shard is missing or damaged.
        """
        shard = self.manifest["shards"].get(INFORMATION)
        return None if shard is None else read_safetensors(self.folder / shard)[0]


@dataclass(frozen=True)
class SampledSide:
    """The `keys`, `values` or squares in a folder of samples, a layer in memory at a time."""

    samples: Samples
    layers: tuple[int, ...]
    side: str

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> torch.Tensor:
        """The i-th full-attention layer.

        Raises:
            UserError: as `Samples.layer`.
        """
        return self.samples.layer(self.layers[i], self.side)


@dataclass(frozen=True)
class Sampled:
    """The samples of a calibration text, for training.

    keys, values: [L, Hkv, n, D]; squares: of either side, [L, Hkv, n], -1 where not known;
    positions: [L, n], of the tokens in their texts; information: an `Information.state()`, or None;
    tokens: read in all.
    """

    keys: LayerSamples
    values: LayerSamples
    squares: tuple[LayerSamples, LayerSamples]
    positions: Sequence[torch.Tensor]
    information: dict[str, torch.Tensor] | None
    tokens: int

    @classmethod
    def in_folder(cls, samples: Samples) -> Sampled:
        """The samples in a folder, read a layer at a time when needed."""
        keys, values = samples.sides()
        positions = [samples.shard(layer, ["positions"])["positions"] for layer in samples.fingerprint.layers]
        information, seen = samples.information(), samples.manifest["seen"]
        return cls(keys, values, samples.squares(), positions, information, seen)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of samples in format {FORMAT}")
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(
                f"{path}: the field `{name}` is damaged or missing; remove the folder to sample again"
            )
    return manifest
