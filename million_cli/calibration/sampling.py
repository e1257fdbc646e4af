"""Recording K and V while a model reads text.

Keys are kept as they would be at position 0 where the model's rotary embedding allows it, so that they can be
turned to any position before training (see `calibration.moving`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from million_cli.calibration.information import Information, Observed
from million_cli.calibration.reservoir import Reservoir
from million_cli.calibration.samples import FORMAT, INFORMATION, MANIFEST, Sampled, Samples, read_manifest
from million_cli.errors import UserError
from million_cli.files import write_safetensors, write_text
from million_cli.hf.models import fingerprint
from million_cli.hf.own_layers import reset_layer
from million_cli.hf.rotary import Rotary
from million_cli.hf.trial import check_served, parts_of


class SamplingLayer(DynamicLayer):
    """A dense cache layer that also offers every new token to a reservoir."""

    def __init__(self, cache: SamplingCache, position: int) -> None:
        super().__init__()
        self._cache, self._position = cache, position

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, N, D]` and return all K and V, as transformers' layer does."""
        self._cache.offer(self._position, key_states, value_states, self.get_seq_length())
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
        rotary: the model's, to bring keys to position 0; None keeps them as they are.

    Raises:
        UserError: `samples` or `seed` out of range, or an unsupported architecture.
    """

    def __init__(
        self, model: PreTrainedModel, samples: int, seed: int = 0, rotary: Rotary | None = None
    ) -> None:
        if samples < 1:
            raise UserError(f"samples={samples}: accepted are 1 and more")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed}: accepted are 0 to 2**63 - 1")
        self.fingerprint = fingerprint(model)
        check_served(model)
        self.capacity, self.seed, self.rotary = samples, seed, rotary
        self.mask: torch.Tensor | None = None
        self.reservoirs = {index: Reservoir(samples, seed, layer=index) for index in self.fingerprint.layers}
        layers = DynamicCache(config=model.config).layers
        for position, index in enumerate(self.reservoirs):
            layers[index] = SamplingLayer(self, position)
        super().__init__(layers=layers)

    @torch.no_grad()
    def offer(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Offer the tokens start, start + 1, ... of a text to the sample of a full-attention layer.

        Args:
            layer: counted among the full-attention layers.
            keys, values: `[B, Hkv, N, D]`, keys after RoPE.
        """
        stop = start + keys.shape[-2]
        new, positions = None, torch.arange(start, stop, device=keys.device)[None]
        if self.mask is not None:
            new, positions = self.mask[:, start:stop].bool(), text_positions(self.mask)[:, start:stop]
        if self.rotary is not None:
            keys = self.rotary.to_origin(layer, keys, positions[:, None], stop)
        self.reservoirs[self.fingerprint.layers[layer]].add(keys, values, new, positions)

    @property
    def seen(self) -> int:
        """Tokens offered to each layer's reservoir so far."""
        return next(iter(self.reservoirs.values())).seen

    def reset(self) -> None:
        """Forget the dense K and V and the mask, ready for the next text; the sample stays."""
        self.mask = None
        for layer in self.layers:
            reset_layer(layer)

    def take(self, observed: Sequence[Observed]) -> None:
        """Offer whole windows as `Information.read` saw them: window after window, whatever the batch."""
        for layer, (reservoir, seen) in enumerate(zip(self.reservoirs.values(), observed, strict=True)):
            B, _, T, _ = seen.keys.shape
            positions, keys = torch.arange(T, device=seen.keys.device), seen.keys
            if self.rotary is not None:
                keys = self.rotary.to_origin(layer, keys, positions, T)
            keys, values = (x.transpose(0, 1).flatten(1, 2)[None] for x in (keys, seen.values))
            squares = seen.squares.transpose(1, 2).flatten(2, 3)[:, None]
            reservoir.add(keys, values, None, positions.repeat(B)[None], squares)

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

    def sampled(self, information: Information) -> Sampled:
        """The samples, with the information that was gathered from the same text, for training.

        Raises:
            UserError: no text was read yet.
        """
        keys, values = self.samples()
        return Sampled(keys, values, self.squares(), list(self.positions()), information.state(), self.seen)

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
            progress: the caller's state to continue the text from, as JSON values.
            information: `Information.state()` gathered from the same text, for a shard of its own.

        Raises:
            UserError: nothing was sampled yet, or the folder cannot be written.
        """
        current = read_manifest(folder)
        generation = 0 if current is None else current["generation"] + 1
        shards = {}
        for index, reservoir in self.reservoirs.items():
            name = f"layer-{index:03d}.{generation}.safetensors"
            write_safetensors(folder / name, reservoir.state())
            shards[str(index)] = name
        if information is not None:
            shards[INFORMATION] = f"{INFORMATION}.{generation}.safetensors"
            write_safetensors(folder / shards[INFORMATION], information)
        manifest = {
            "format": FORMAT,
            "generation": generation,
            "fingerprint": self.fingerprint.to_dict(),
            "samples": self.capacity,
            "seed": self.seed,
            "seen": self.seen,
            "at_origin": self.rotary is not None,
            "shards": shards,
            "progress": progress or {},
        }
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for shard in (*folder.glob("layer-*.*.safetensors"), *folder.glob(f"{INFORMATION}.*.safetensors")):
            if shard.name not in shards.values():
                shard.unlink(missing_ok=True)

    def resume(self, folder: Path) -> dict[str, Any] | None:
        """Restore the state that `save` left in `folder`; the sample becomes that of an uninterrupted run.

        Returns:
            The `progress` given to `save`, or None if the folder holds no state.

        Raises:
            UserError: the state is damaged, or of another model, seed or sample size.
        """
        if read_manifest(folder) is None:
            return None
        stored = Samples(folder)
        differences = stored.fingerprint.differences(self.fingerprint)
        expected = {"samples": self.capacity, "seed": self.seed, "at_origin": self.rotary is not None}
        for name, ours in expected.items():
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
        chunk_tokens: positions a forward pass; bounds the memory, does not change the sample.  A model that
            forgets between passes (see `hf.trial`) reads all at once.
    """
    cache.reset()
    device = model.device
    input_ids = input_ids.to(device)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
        if isinstance(cache, SamplingCache):
            cache.mask = attention_mask
    decoder = model.get_decoder()
    if not parts_of(model).in_two:
        chunk_tokens = input_ids.shape[1]
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
