"""A PQ cache of fixed size for `generate`'s own compiled path.

transformers compiles a decode step (to CUDA graphs on a GPU) if all layers of the cache are compileable.  A
compiled step runs no Python, so the device counts the tokens, and the host reads the count when it needs it.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from million_cli.cache.modes import refuse_gradients
from million_cli.errors import UserError
from million_cli.hf.attention import PQHandle
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.pq_cache import PQLayer
from million_cli.hf.pq_steps import PQSteps, steps_reason
from million_cli.hf.select import COMPILED, Kernels
from million_cli.hf.step import StepHandle
from million_cli.pq.codebook import Codebook
from million_cli.spec import WindowSpec


class StaticPQLayer(PQLayer):
    """A layer whose steps of one token can be compiled; several tokens at once go as in `PQLayer`."""

    marker: Tensor | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # a class attribute in transformers
        return self._cache.can_step  # type: ignore[attr-defined]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.marker is None or key_states.shape[2] > 1:
            return super().update(key_states, value_states, *args, **kwargs)
        refuse_gradients(key_states, value_states)
        handle = StepHandle(key_states, value_states, self.marker, self._position)
        return handle, handle

    def get_seq_length(self) -> Any:
        """Tokens a sequence: a number, or during compiled steps a 0-dimensional tensor on the device."""
        return self._cache.tokens  # type: ignore[attr-defined]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Called on the host before each step; the mask of a step has a fixed size."""
        if self._cache.before_forward(query_length):  # type: ignore[attr-defined]
            return self.get_max_length(), 0
        return self._cache.store.length(self._position) + query_length, 0

    def get_max_length(self) -> int:
        return int(self._cache.max_length)  # type: ignore[attr-defined]


class StaticPQCache(PagedPQCache):
    """A `PagedPQCache` with memory for `max_length` tokens a sequence, taken at the first append.

    Where kernels serve it and all layers have full attention, `generate` compiles its steps as it does for a
    static cache; otherwise it behaves as a `PagedPQCache`.

    Args:
        max_length: prompt and new tokens together.
        others: as for `PagedPQCache`.

    Raises:
        UserError: as `PagedPQCache`; later, more tokens than `max_length`.
    """

    _layer_class = StaticPQLayer

    def __init__(
        self,
        model: PreTrainedModel,
        codebook: Codebook | str | os.PathLike[str],
        window: WindowSpec | None = None,
        *,
        max_length: int,
        prefill: Literal["exact", "quantized"] = "exact",
        compute: Literal["auto", "kernel", "torch"] = "auto",
        strict: bool = False,
        kernels: Kernels = COMPILED,
    ) -> None:
        if max_length < 1:
            raise UserError(f"max_length={max_length}: accepted are positive integers")
        self.max_length = max_length
        self._pq_steps: PQSteps | None = None
        self._asked = 0  # steps that may have run since the host last read the length
        super().__init__(
            model, codebook, window, prefill=prefill, compute=compute, strict=strict, kernels=kernels
        )

    @property
    def can_step(self) -> bool:
        """Whether steps of one token can be compiled."""
        return steps_reason(self) is None

    @property
    def tokens(self) -> int | Tensor:
        """Tokens a sequence; during compiled steps a tensor on the device."""
        return self.steps.device_length() if self._asked else self.store.length()

    def before_forward(self, new_tokens: int) -> bool:
        """Make room for a forward pass; True if it is a step.

        Raises:
            UserError: more tokens than there is room for.
        """
        is_step = new_tokens == 1 and self.can_step and self.store.batch is not None
        if not is_step or self.store.length() + self._asked + 1 > self.max_length:
            self._settle()
        if self.store.length() + new_tokens > self.max_length:
            raise UserError(
                f"{self.store.length() + new_tokens} tokens: this cache was made for {self.max_length}"
            )
        self.check_positions(self.store.length() + self._asked + new_tokens)
        if is_step and not self._asked:
            self._begin_steps()
        if is_step:
            self.store.prepare_steps(self._asked)
        self._asked += is_step
        return is_step

    def append(self, position: int, keys: Tensor, values: Tensor) -> PQHandle:
        self._settle()
        if self.store.batch is None:
            self.store.expect(self.max_length)
        return super().append(position, keys, values)

    def _begin_steps(self) -> None:
        """Take all pages and allocate the operations' buffers: a compiled step must not allocate."""
        if self._pq_steps is None:
            self._pq_steps = PQSteps(self, self._query.device)
        self._pq_steps.begin(None)
        self.store.reserve(self.max_length)
        self.steps.prime(self._query.num_kv_heads * self._query.group)
        for layer in self.layers:
            assert isinstance(layer, StaticPQLayer)
            layer.marker = self._pq_steps.marker

    def _settle(self) -> None:
        """Read from the device how many steps have run."""
        if not self._asked:
            return
        self._asked = 0
        self.steps.advance(int(self.steps.device_length()) - self.store.length())
        for layer in self.layers:
            if isinstance(layer, StaticPQLayer):
                layer.marker = None

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "_pq_steps": None}

    def save(self, path: str | os.PathLike[str]) -> None:
        self._settle()
        super().save(path)

    def memory(self) -> dict[str, int]:
        self._settle()
        return super().memory()

    def reset(self, release: bool = True) -> None:
        self._settle()
        super().reset(release)

    def crop(self, argument: int) -> None:
        self._settle()
        super().crop(argument)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._settle()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._settle()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._settle()
        super().batch_select_indices(indices)
