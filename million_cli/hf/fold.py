"""The values' map multiplied into the model's own projections, so that decode steps need no map.

Values v = h W are coded as v E and attention's output o is taken back by D = E^-1 (see `pq.transform`).  With
W E in place of W and D O in place of O, O being the output projection, the model makes and reads coded values
by itself: the same function up to rounding, dense caches included.  Keys and queries have no such place, as
RoPE lies between.

Letters: D head_dim (or the map back), Hkv KV heads, Hq query heads.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from million_cli.errors import UserError
from million_cli.hf.models import attention_modules, fingerprint
from million_cli.pq.codebook import Codebook

_TOKENS = 16  # that are read before and after
_LEAST_ACCEPTED = 1e-3  # change of logits, over their spread; maps are float32


class FoldedValues:
    """A model with the values' maps of a codebook in its projections, until `undo` (or the end of a `with`).

    The products are taken in float64 and rounded once to the weights' dtype.

    Attributes:
        codebook: the same codes for the changed model, without maps for values.

    Raises:
        UserError: the codebook belongs to another model or has no maps for values; or the model norms values,
            has no output projection, shares projections among layers, or gives other logits once folded (it
            then has its own weights again).
    """

    def __init__(self, model: PreTrainedModel, codebook: Codebook) -> None:
        codebook.check(fingerprint(model))
        transform = codebook.values.transform
        if transform is None:
            raise UserError("fold=true: the codebook's values have no rotation or metric to fold")
        modules = dict(attention_modules(model))
        layers = codebook.meta.fingerprint.layers
        places = [_places(model, modules[index]) for index in layers]
        owned = [id(parameter) for place in places for parameter in place if parameter is not None]
        if len(set(owned)) < len(owned):
            raise UserError(
                f"fold=true: model_type={model.config.model_type} shares projections among layers"
            )
        self._model = model
        self._originals: list[tuple[Tensor, Tensor]] = []  # (view of a parameter, what it was)
        heads = codebook.meta.fingerprint.num_kv_heads
        before = _logits(model)
        with torch.no_grad():
            for i, (weight, bias, output) in enumerate(places):
                layer = transform.layer(i)
                maps = (layer.encode, layer.decode)
                encode, decode = (m.expand(heads, -1, -1).to(weight.device, torch.float64) for m in maps)
                rows = weight[-heads * encode.shape[-1] :]  # of all of it, or of queries, keys and values
                self._replace(rows, (encode.mT @ _heads(rows, heads)).flatten(0, 1))
                if bias is not None:
                    part = bias[-len(rows) :]
                    self._replace(part, (encode.mT @ _heads(part[:, None], heads)).flatten())
                columns = output.mT.double().unflatten(
                    0, (heads, -1, encode.shape[-1])
                )  # by KV head and its queries
                self._replace(output, (decode[:, None] @ columns).flatten(0, 2).mT)
        changed = _difference(before, _logits(model))
        accepted = max(_LEAST_ACCEPTED, 16 * torch.finfo(model.dtype).eps)
        if not changed <= accepted:
            self.undo()
            raise UserError(
                f"fold=true: model_type={model.config.model_type}: it does more to values than project them: "
                f"folding changes its logits by {changed:.2g} of their spread; accepted is {accepted:.2g}"
            )
        meta = replace(codebook.meta, fingerprint=fingerprint(model))
        self.codebook = Codebook(codebook.keys, replace(codebook.values, transform=None), meta)

    def undo(self) -> None:
        """Give the model its weights back, bit by bit."""
        with torch.no_grad():
            while self._originals:
                place, original = self._originals.pop()
                place.copy_(original)

    def __enter__(self) -> FoldedValues:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _replace(self, place: Tensor, content: Tensor) -> None:
        self._originals.append((place, place.detach().to("cpu", copy=True)))
        place.copy_(content)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits `[N, V]` of a few tokens, in float64."""
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(_TOKENS, device=model.device)[None] * 7919 % size  # spread over the vocabulary
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.double()


def _difference(before: Tensor, after: Tensor) -> float:
    """Change of logits over their spread, root mean squares, each of the median token.

    The median passes over tokens that rounding sends to other experts, and over padding.
    """
    change = (after - before).square().mean(-1).sqrt()
    return float(change.median() / before.std(-1).median())


def _heads(rows: Tensor, heads: int) -> Tensor:
    """Rows of a projection `[Hkv * D, n]` by head, float64 `[Hkv, D, n]`."""
    return rows.double().unflatten(0, (heads, -1))


def _places(model: PreTrainedModel, module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight and bias of the projection that makes values (its last rows), weight of the output."""
    name = model.config.model_type
    made = getattr(module, "v_proj", None) or getattr(module, "qkv_proj", None)
    output = getattr(module, "o_proj", None)
    if not isinstance(made, nn.Linear) or not isinstance(output, nn.Linear):
        raise UserError(f"fold=true: model_type={name}: accepted are models with plain v_proj and o_proj")
    if getattr(module, "v_norm", None) is not None:
        raise UserError(
            f"fold=true: model_type={name}: its values pass a norm, which a map does not commute with"
        )
    return made.weight, made.bias, output.weight
