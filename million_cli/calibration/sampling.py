"""Recording K (after RoPE) and V while a model reads text, and the files that hold the samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from million_cli.calibration.information import Information, Squares, mean_of_state
from million_cli.calibration.reservoir import Reservoir
from million_cli.errors import UserError
from million_cli.files import read_safetensors, write_safetensors, write_text
from million_cli.hf.compat import reset_dense_layer
from million_cli.hf.models import fingerprint
from million_cli.pq.samples import LayerSamples
from million_cli.spec import ModelFingerprint

_MANIFEST = "manifest.json"
_INFORMATION = "information"
_FIELDS = {
    **dict.fromkeys(("generation", "samples", "seed", "seen"), int),
    **dict.fromkeys(("fingerprint", "shards", "progress"), dict),
}
_FORMAT = 4  # 4: positions of the sampled tokens in their texts


class SamplingLayer(DynamicLayer):
    """A dense cache layer that also offers every new token to a reservoir."""

    def __init__(self, cache: SamplingCache, reservoir: Reservoir) -> None:
        super().__init__()
        self._cache = cache
        self.reservoir = reservoir

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, N, D]` and return all K and V, as transformers' layer does."""
        start, mask = self.get_seq_length(), self._cache.mask
        stop = start + key_states.shape[-2]
        if mask is None:
            self.reservoir.add(key_states, value_states, None, torch.arange(start, stop)[None])
        else:
            new, positions = mask[:, start:stop].bool(), text_positions(mask)[:, start:stop]
            self.reservoir.add(key_states, value_states, new, positions)
        return super().update(key_states, value_states, *args, **kwargs)


class SamplingCache(Cache):
    """A dense cache for a model that reads text; it keeps a uniform sample of each full-attention layer.

    The sample is over all tokens seen since construction, through any number of `reset()`s; its memory is
    `2 * L * Hkv * samples * D` elements on the CPU however long the text.  The same tokens are kept for all
    heads of a layer, others for each layer.  It depends on the seed and the tokens only, not on chunking or
    interruptions (see `Reservoir`).  Works with any attention implementation of the model.

    Args:
        model: whose K and V are recorded.
        samples: tokens kept a layer.
        seed: >= 0; the same seed and text give the same sample.

    Raises:
        UserError: `samples` or `seed` out of range, or an unsupported architecture.
    """

    def __init__(self, model: PreTrainedModel, samples: int, seed: int = 0) -> None:
        if samples < 1:
            raise UserError(f"samples={samples}: accepted are 1 and more")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed}: accepted are 0 to 2**63 - 1")
        self.fingerprint = fingerprint(model)
        self.capacity, self.seed = samples, seed
        self.mask: torch.Tensor | None = None
        self.reservoirs = {index: Reservoir(samples, seed, layer=index) for index in self.fingerprint.layers}
        layers = DynamicCache(config=model.config).layers
        for index, reservoir in self.reservoirs.items():
            layers[index] = SamplingLayer(self, reservoir)
        super().__init__(layers=layers)

    @property
    def seen(self) -> int:
        """Tokens offered to each layer's reservoir so far."""
        return next(iter(self.reservoirs.values())).seen

    def reset(self) -> None:
        """Forget the dense K and V and the mask, ready for the next text; the sample stays."""
        self.mask = None
        for layer in self.layers:
            reset_dense_layer(layer)

    def weigh(self, squares: Sequence[Squares], first: int, stride: int = 1) -> None:
        """Note what `Information.read` gave for one text, which was sampled without padding.

        Args:
            squares: `[1, Hkv, coded]` of keys and of values, for each layer; none if the text was too short.
            first: the text's first token, counted from the first that was ever sampled.
            stride: texts that were sampled in one batch: their tokens alternate.
        """
        for reservoir, (keys, values) in zip(self.reservoirs.values(), squares, strict=False):
            reservoir.weigh(first + stride * np.arange(keys.shape[-1]), keys[0], values[0])

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared gradients of the samples of keys and of values, `[L, Hkv, n]`; -1 where not known.

        Raises:
            UserError: no text was read yet.
        """
        keys, values = zip(*(one.squares() for one in self.reservoirs.values()), strict=True)
        return torch.stack(keys), torch.stack(values)

    def positions(self) -> torch.Tensor:
        """Position of each sampled token in its text, int64 `[L, n]`."""
        return torch.stack([one.positions() for one in self.reservoirs.values()])

    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[L, Hkv, n, D]` on the CPU, L over the full-attention layers.

        Raises:
            UserError: no text was read yet.
        """
        contents = [reservoir.contents() for reservoir in self.reservoirs.values()]
        return torch.stack([keys for keys, _ in contents]), torch.stack([values for _, values in contents])

    def save(
        self,
        folder: Path,
        progress: dict[str, Any] | None = None,
        information: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the sample and all that `resume` needs: one safetensors shard a layer, then the manifest.

        The manifest is what makes a set of shards current, and is replaced in one step: a run killed at any
        moment leaves the previous state whole.  Shards that no manifest names any more are removed last.

        Args:
            progress: what the caller needs to go on with the text, as JSON values.
            information: `Information.state()` gathered from the same text, for a shard of its own.

        Raises:
            UserError: nothing was sampled yet, or the folder cannot be written.
        """
        current = _read_manifest(folder)
        generation = 0 if current is None else current["generation"] + 1
        shards = {}
        for index, reservoir in self.reservoirs.items():
            name = f"layer-{index:03d}.{generation}.safetensors"
            write_safetensors(folder / name, reservoir.state())
            shards[str(index)] = name
        if information is not None:
            shards[_INFORMATION] = f"{_INFORMATION}.{generation}.safetensors"
            write_safetensors(folder / shards[_INFORMATION], information)
        manifest = {
            "format": _FORMAT,
            "generation": generation,
            "fingerprint": self.fingerprint.to_dict(),
            "samples": self.capacity,
            "seed": self.seed,
            "seen": self.seen,
            "shards": shards,
            "progress": progress or {},
        }
        write_text(folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for shard in (*folder.glob("layer-*.*.safetensors"), *folder.glob(f"{_INFORMATION}.*.safetensors")):
            if shard.name not in shards.values():
                shard.unlink(missing_ok=True)

    def resume(self, folder: Path) -> dict[str, Any] | None:
        """Take up the state that `save` left in `folder`; going on gives the sample of an uninterrupted run.

        Returns:
            The `progress` given to `save`, or None if the folder holds no state.

        Raises:
            UserError: the state is damaged, or of another model, seed or sample size.
        """
        if _read_manifest(folder) is None:
            return None
        stored = Samples(folder)
        differences = stored.fingerprint.differences(self.fingerprint)
        for name, ours in (("samples", self.capacity), ("seed", self.seed)):
            if stored.manifest[name] != ours:
                differences.append(f"{name}: {stored.manifest[name]} != {ours}")
        if differences:
            raise UserError(f"{folder} holds samples of another run: {'; '.join(differences)}")
        for index, reservoir in self.reservoirs.items():
            try:
                reservoir.restore(stored.shard(index))
            except (
                AssertionError,
                AttributeError,
                IndexError,
                KeyError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                raise UserError(
                    f"{folder}: the samples of layer {index} are damaged ({why}); "
                    "remove the folder to sample again"
                ) from error
        return stored.manifest["progress"]


@dataclass(frozen=True)
class Samples:
    """The samples that `SamplingCache.save` left in a folder, read a layer at a time.

    Raises:
        UserError: the folder holds no samples, or damaged ones.
    """

    folder: Path

    def __post_init__(self) -> None:
        if _read_manifest(self.folder) is None:
            raise UserError(
                f"{self.folder}: no samples here (no {_MANIFEST}); make some with `million sample`"
            )

    @property
    def manifest(self) -> dict[str, Any]:
        manifest = _read_manifest(self.folder)
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
        """A layer's reservoir state (or what of it `names` says), by the model's layer index.

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
        shard = self.manifest["shards"].get(_INFORMATION)
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
    """The samples of a calibration text, as training takes them.

    keys, values: [L, Hkv, n, D]; squares: of either side, [L, Hkv, n], -1 where not known;
    positions: [L, n], of the tokens in their texts; information: Fisher information of either side,
    [L, Hkv, D, D], or None; tokens: read in all.
    """

    keys: LayerSamples
    values: LayerSamples
    squares: tuple[LayerSamples, LayerSamples]
    positions: Sequence[torch.Tensor]
    information: tuple[torch.Tensor, torch.Tensor] | None
    tokens: int

    @classmethod
    def in_memory(cls, cache: SamplingCache, information: Information) -> Sampled:
        """What `cache` holds."""
        keys, values = cache.samples()
        return cls(keys, values, cache.squares(), list(cache.positions()), information.mean(), cache.seen)

    @classmethod
    def in_folder(cls, samples: Samples) -> Sampled:
        """What a folder holds, read a layer at a time when asked for."""
        keys, values = samples.sides()
        state = samples.information()
        positions = [samples.shard(layer, ["positions"])["positions"] for layer in samples.fingerprint.layers]
        information = None if state is None else mean_of_state(state)
        return cls(keys, values, samples.squares(), positions, information, samples.manifest["seen"])


@torch.inference_mode()
def read_text(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_tokens: int = 2048,
) -> None:
    """Let `model` read one context with an emptied `cache`, without computing logits.

    Args:
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 0 for padding (on the left); None if there is none.
        chunk_tokens: positions a forward pass; bounds the memory, does not change the sample.
    """
    cache.reset()
    device = model.device
    input_ids = input_ids.to(device)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
        if isinstance(cache, SamplingCache):
            cache.mask = attention_mask
    decoder = model.get_decoder()
    for start in range(0, input_ids.shape[1], chunk_tokens):
        stop = start + chunk_tokens
        mask = None if attention_mask is None else attention_mask[:, :stop]
        positions = None if mask is None else text_positions(mask)[:, start:stop]
        decoder(
            input_ids=input_ids[:, start:stop],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )


def text_positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its text, behind the padding: mask `[B, T]` -> int64 `[B, T]`."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(f"{path}: not a manifest of samples in format {_FORMAT}")
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(
                f"{path}: the field `{name}` is damaged or missing; remove the folder to sample again"
            )
    return manifest
