"""The interface of tasks: `Config`, `measure`, `TaskResult`.

A task is a module with a `Config` (its configuration, a dataclass) and a `measure` function:

    measure(model, tokenizer, caches, text, config, seed) -> TaskResult

`caches` makes the cache under test; the task itself makes the dense cache that it compares with.  A task that
reads more than a text, or none, has `load(config)`; its result, with a `sha256` and, if other files belong
to it, `files` (name -> SHA-256), replaces the text.  A task with `RESUMABLE = True` also takes `journals`,
and keeps there the results so far.  `measure` is decorated by `finite`, so that it refuses NaN and infinity
whoever calls it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from million_cli.errors import UserError
from million_cli.hf.compat import check_held
from million_cli.hf.switch import use_pq_attention

Prefill = Literal["exact", "quantized", "distort"]
Scalar = str | int | float | bool | None


class CacheFactory(Protocol):
    """Makes an empty cache for one batch; `prefill` selects what the tokens of one pass attend to.

    exact: exact K and V of all tokens that were not coded before the pass.
    quantized: the codes and window that each token would see when decoded one by one.
    distort: codes for all tokens, their own K and V included (as the MILLION paper evaluates).
    """

    def __call__(self, prefill: Prefill) -> Cache: ...


@dataclass(frozen=True)
class TaskResult:
    """`metrics` become columns of the record; each of `tables` becomes a CSV of its own."""

    metrics: Mapping[str, Scalar]
    tables: Mapping[str, Sequence[Mapping[str, Scalar]]] = field(default_factory=dict)


def check_task(config: Any, **least: int) -> None:
    """Raise UserError if a setting is below its least value (None passes), or `prefill` is not accepted."""
    prefill = getattr(config, "prefill", "exact")
    if prefill not in ("quantized", "exact"):
        raise UserError(f"task.prefill={prefill}: accepted are quantized, exact")
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise UserError(f"task.{name}={value}: accepted are integers from {smallest}")


Measure = Callable[..., TaskResult]


@contextmanager
def finite_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within it every forward pass is watched; one that gave NaN or infinite logits is refused at the end.

    A comparison of NaN with NaN would count as agreement.

    Raises:
        UserError: on leaving, if some logits were not finite.
    """
    head = model.get_output_embeddings()
    finite: list[Tensor] = []

    def watch(module: Any, arguments: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor) and logits.is_floating_point():
            # One number a pass, left on the device: a sum is finite if all its terms are.
            finite.append(logits.sum(dtype=torch.promote_types(logits.dtype, torch.float32)).isfinite())
            finite[:] = [torch.stack(finite).all()]

    hook = (model if head is None else head).register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()
    if finite and not finite[0]:
        raise UserError(
            f"model_type={model.config.model_type}: the logits hold NaN or infinity, so nothing is measured; "
            f"accepted are sound weights in a dtype that holds their activations ({model.dtype} here)"
        )


def finite(task: str) -> Callable[[Measure], Measure]:
    """Let a `measure` function refuse NaN and infinity, in logits and in its metrics.

    Whoever calls it, it raises UserError then; one that is marked already is left as it is.
    """

    def mark(measure: Measure) -> Measure:
        if getattr(measure, "refuses_nonfinite", False):
            return measure

        @wraps(measure)
        def watched(model: PreTrainedModel, *args: Any, **kwargs: Any) -> TaskResult:
            with finite_logits(model):
                result = measure(model, *args, **kwargs)
            check_finite(task, result.metrics)
            return result

        watched.refuses_nonfinite = True  # type: ignore[attr-defined]
        return watched

    return mark


def check_finite(task: str, metrics: Mapping[str, Scalar]) -> None:
    """Raise UserError if a metric is NaN or infinite, naming it."""
    wrong = [f"{name}={value}" for name, value in metrics.items() if not _is_finite(value)]
    if wrong:
        raise UserError(f"task={task} gave {', '.join(wrong)}; accepted are finite results")


def _is_finite(value: Scalar) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def check_extra(who: str, extra: str, modules: Sequence[str]) -> None:
    """Raise UserError unless the modules of one of the package's extras are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{who} needs {', '.join(missing)}; pip install 'million[{extra}]' has them")


def dense_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache, empty.

    It is read by the attention function that PQ caches use, where the model has that, so that a comparison
    shows the codes alone (transformers' sdpa has no softcap).
    """
    cache = DynamicCache(config=model.config)
    with suppress(UserError):
        use_pq_attention(model)
        cache.needs_pq_attention = True  # type: ignore[attr-defined]  # read by hf.switch
    return cache


def memory_metrics(cache: Cache, dense: Cache) -> dict[str, Scalar]:
    """Bytes of two caches that hold the same tokens, measured from their tensors.

    Returns:
        bits_nominal: of a stored element, windows and tables aside; cache_bytes and its parts; codebook_bytes
        (apart: they do not grow with the text); cache_ratio: cache_bytes over a 16-bit dense cache's bytes;
        backend: the store and the compute that served the cache last.
    """
    elements = sum(t.numel() for t in _tensors(dense))
    dense_bytes = sum(t.nbytes for t in _tensors(dense))
    fp16_bytes = 2 * elements
    shared: dict[str, Scalar] = {"cache_tokens": _tokens(dense), "dense_bytes": dense_bytes}
    memory = getattr(cache, "memory", None)
    if memory is None and hasattr(cache, "bits"):
        return {"bits_nominal": cache.bits}  # simulated: its bytes are not those of the codes
    if memory is None:
        own = sum(t.nbytes for t in _tensors(cache))
        return {
            "bits_nominal": 8.0 * own / elements,
            "cache_bytes": own,
            **shared,
            "cache_ratio": own / fp16_bytes,
        }
    parts = memory()
    return {
        "backend": str(cache.backend),  # type: ignore[attr-defined]
        "bits_nominal": cache.bits,  # type: ignore[attr-defined]
        "cache_bytes": parts["total"],
        **shared,
        "cache_ratio": parts["total"] / fp16_bytes,
        "code_bytes": parts["key_codes"] + parts["value_codes"],
        "window_bytes": parts["window"],
        "block_table_bytes": parts["block_table"],
        "pool_reserved_bytes": parts["pool_reserved"],
        "codebook_bytes": parts["codebooks"],
    }


def memory_of_prompt(model: PreTrainedModel, cache: Cache, ids: Sequence[int]) -> dict[str, Scalar]:
    """`memory_metrics` once `cache`, empty before, and a dense cache have read the tokens `ids`."""
    dense = dense_cache(model)
    prompt = torch.tensor([ids], device=model.device)
    for each in (cache, dense):
        model(input_ids=prompt, past_key_values=each, use_cache=True, logits_to_keep=1)
        check_held(each, prompt.shape[1])
    return memory_metrics(cache, dense)


def longest_context(model: PreTrainedModel) -> int:
    """The model's context length, in tokens."""
    return int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048))


def check_context(name: str, value: int, model: PreTrainedModel) -> None:
    """Raise UserError if `value` tokens are more than the model takes."""
    if not 2 <= value <= longest_context(model):
        raise UserError(f"{name}={value}: accepted are 2 to {longest_context(model)}, the model's maximum")


def _tensors(cache: Cache) -> list[Any]:
    tensors = [getattr(layer, side, None) for layer in cache.layers for side in ("keys", "values")]
    return [t for t in tensors if t is not None]


def _tokens(cache: Cache) -> int:
    """Tokens of all sequences together."""
    batch = max((t.shape[0] for t in _tensors(cache)), default=0)
    return batch * cache.get_seq_length()
