"""The attention function that transformers calls: dense K and V go to sdpa, handles to attention over codes.

An attention layer gives the two objects that `Cache.update` returned, untouched, to the function registered
under its `_attn_implementation`.  So a PQ cache returns a `PQHandle` in place of K and V, and nothing of
transformers is patched.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from million_cli.cache.view import KVView
from million_cli.errors import UserError
from million_cli.hf.padding import padding_mask, unless_all_seen
from million_cli.hf.step import StepHandle, step_attention
from million_cli.hf.switch import ATTENTION_NAME
from million_cli.ops.masked import masked_attention

_CHANGES_ATTENTION = ("position_bias",)
"""Refused for dense K and V too: sdpa would ignore these arguments."""
_WITHOUT_EFFECT = frozenset(
    (
        "is_causal", "sliding_window",  # looked at
        "position_ids", "cache_position", "position_embeddings",  # K and queries are rotated already
        "use_cache", "logits_to_keep", "return_dict", "output_hidden_states", "output_router_logits",
        "num_items_in_batch", "deterministic", "token_type_ids",
    )
)  # fmt: skip
"""Arguments of attention functions that need nothing here; all others are refused."""


class Attend(Protocol):
    """Attention of the N newest tokens `query [B, Hq, N, D]` over a view; see `cache.view.attend`."""

    def __call__(
        self,
        query: Tensor,
        view: KVView,
        *,
        scale: float,
        mask: Tensor | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor: ...


class PQHandle:
    """Stands for K and for V of one layer on their way from the cache to the attention function.

    It has no dense form: any use as a tensor raises a `UserError` of one line.
    """

    def __init__(self, view: KVView, attend: Attend) -> None:
        self.view = view
        self.attend = attend

    def to(self, *args: Any, **kwargs: Any) -> PQHandle:
        """The handle itself: some models move K and V to a layer's device, and codes already are there."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what Python and pytree utilities probe for
            raise AttributeError(name)
        _refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(function, "__name__", str(function)))


def _refuse(use: str) -> NoReturn:
    raise UserError(
        f"the model's attention cannot read a PQ cache (it wants `{use}` of K or V): either the cache was "
        "made from another model, or this architecture keeps K and V in a form that is not supported"
    )


def _refusal(name: str) -> Any:
    def operator(self: PQHandle, *args: Any) -> NoReturn:
        _refuse(name)

    return operator


# Python looks operators up in the class, not by `__getattr__`.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "neg",
              "pow", "getitem", "setitem"):  # fmt: skip
    setattr(PQHandle, f"__{_name}__", _refusal(f"__{_name}__"))


def pq_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PQHandle | StepHandle,
    value: Tensor | PQHandle | StepHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers registers.

    Args:
        query: `[B, Hq, N, D]`.
        key, value: `[B, Hkv, T, D]`, or the same `PQHandle` or `StepHandle` twice.
        attention_mask: the result of `padding_mask`: None for plain causal attention, else bool
            `[B, 1, N, T]`; for a `StepHandle` the result of `padding_of_step`.
        s_aux: `[Hq]`, attention sinks: a logit a head that takes its share of the softmax.

    Returns:
        `[B, N, Hq, D]`, and no attention weights.

    Raises:
        UserError: a feature that attention over codes lacks.
    """
    if kwargs.get("output_attentions"):
        raise UserError("output_attentions=True: attention over codes keeps no weights; accepted is False")
    for name, given in kwargs.items():
        if given is not None and name in _CHANGES_ATTENTION:
            raise UserError(f"attention with {name} is not supported by {ATTENTION_NAME}")
    if isinstance(key, StepHandle | PQHandle):
        _check_arguments(kwargs)
    if isinstance(key, StepHandle):
        assert softcap is None and s_aux is None, "refused when the steps were made"  # noqa: PT018
        return step_attention(
            query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
        )
    if isinstance(key, PQHandle):
        view = key.view
        if dropout:
            raise UserError(f"attention_dropout={dropout}: a PQ cache does not train; call model.eval()")
        window = kwargs.get("sliding_window")
        if window is not None and view.length > window:
            raise UserError(
                f"{view.length} tokens: this model attends to the latest {window}; accepted are fewer"
            )
        if not _plain_causal(module, kwargs) and attention_mask is None and query.shape[2] > 1:
            raise UserError("bidirectional attention: a PQ cache serves causal attention only")
        # sdpa reads "no mask" as causal from the upper left: right only if the queries are all the tokens.
        sdpa_knows = attention_mask is not None or query.shape[2] in (1, view.length)
        if view.coded or view.device_layer is not None or not sdpa_knows:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = key.attend(query, view, scale=scale, mask=attention_mask, softcap=softcap, sinks=s_aux)
            return output.transpose(1, 2).contiguous(), None
        key, value = view.keys, view.values
    assert isinstance(value, Tensor)
    attention_mask = unless_all_seen(attention_mask)
    if softcap is not None or s_aux is not None:  # which torch's own attention does not have
        if attention_mask is None and query.shape[2] > 1:  # as sdpa reads it: causal from the upper left
            key, value = (x[:, :, : query.shape[2]] for x in (key, value))
        output = masked_attention(
            query,
            (key[:, :, :0], value[:, :, :0]),
            (key, value),
            boundaries=[0] * query.shape[2],
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            mask=attention_mask,
            softcap=softcap,
            sinks=s_aux,
        )
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that attention over codes does not support."""
    for name, given in kwargs.items():
        if name not in _WITHOUT_EFFECT and given is not None and given is not False:
            raise UserError(f"attention with {name} is not supported by {ATTENTION_NAME}")


def _plain_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


AttentionInterface.register(ATTENTION_NAME, pq_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
