"""`million generate`: continue a prompt with the job's cache, streaming."""

from __future__ import annotations

import sys
import time

import torch
from transformers import GenerationConfig, TextStreamer

from million_cli.errors import UserError
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.session import Session
from million_cli.tasks.base import longest_context


@torch.inference_mode()
def generate(config: JobConfig, prompt: str, tokens: int) -> None:
    """Print the greedy continuation as it comes, then its speed and the cache's memory on stderr.

    Raises:
        UserError: an empty prompt, or more tokens than the model takes.
    """
    session = Session(config)
    caches = Caches(session)
    inputs = session.tokenizer(prompt, return_tensors="pt").to(session.device)
    length, longest = inputs["input_ids"].shape[1], longest_context(session.model)
    if not length:
        raise UserError("the prompt is empty")
    if length + tokens > longest:
        raise UserError(
            f"prompt and tokens are {length} + {tokens}; accepted are {longest}, the model's maximum"
        )
    cache = caches("exact")
    started = time.perf_counter()
    output = session.model.generate(  # type: ignore[operator]
        **inputs,
        past_key_values=cache,
        generation_config=GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=session.tokenizer.pad_token_id,
            eos_token_id=session.tokenizer.eos_token_id,
        ),
        streamer=TextStreamer(session.tokenizer, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - started
    new = output.shape[1] - length
    memory = getattr(cache, "memory", None)
    held = f", cache {memory()['total'] / 1024:.0f} KiB" if memory else ""
    print(f"{new} tokens, {new / seconds:.1f} tokens/s{held} ({config.cache.kind})", file=sys.stderr)
