"""The harness's own model for transformers, with our cache for every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.hf.compat import check_held
from million_cli.progress import progress
from million_cli.tasks.answers import plain_generation, stop_tokens


class CachedLM(HFLM):
    """`HFLM` that generates every batch with a cache of `make`.

    Prompts, stop sequences, sampling and post-processing stay the harness's.

    Attributes:
        longest: token ids of the longest prompt so far, as the model was given it.
        cut: prompts so far that lost their beginning, as they did not fit beside their answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        make: Callable[[], Cache],
        label: str,
        *,
        batch: int,
        max_length: int,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=max_length
        )
        self.make = make
        self.label = label
        self.longest: list[int] = []
        self.cut = 0

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of `requests`, with our progress bar in the place of the harness's."""
        with progress(len(requests), f"lm-eval, {self.label}", "prompt") as self._bar:
            return super().generate_until(list(requests), disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The harness's tokens and mask `[B, T]` of a batch; prompts that it cuts are counted."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if not left_truncate_len:
            return ids, mask
        self.cut += int((mask.sum(-1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """The harness's generation of one left-padded batch `context [B, T]`, into an empty cache."""
        for ids, mask in zip(context, settings["attention_mask"], strict=True):
            self.longest = max(self.longest, ids[mask.bool()].tolist(), key=len)
        cache = self.make()
        # What the task leaves open is the harness's and transformers' default, never the model's own setting.
        with plain_generation(self.model, stop_tokens(self.model, self.tokenizer)):
            output: Tensor = super()._model_generate(
                context, max_length=max_length, stop=stop, past_key_values=cache, **settings
            )
        check_held(cache, output.shape[1] - 1)
        self._bar.update(len(context))
        return output
