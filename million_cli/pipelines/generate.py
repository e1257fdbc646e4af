"""`million generate`: continue a prompt with the job's cache, streaming, through the engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from transformers import DynamicCache, TextStreamer

from million_cli.errors import UserError
from million_cli.integration.dense import DenseCache
from million_cli.integration.engine import Engine
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.session import Session
from million_cli.tasks.base import longest_context

DENSE_BUCKET = 256
"""Tokens by which a dense cache's keys grow on a GPU: a graph for each length would take longer than it saves."""


def generate(config: JobConfig, prompt: str, tokens: int) -> None:
    """Print the greedy continuation as it comes, then its speed and the cache's memory on stderr.

    Raises:
        UserError: an empty prompt, or more tokens than the model takes.
    """
    session = Session(config)
    caches = Caches(session)
    inputs = session.tokenizer(prompt, return_tensors="pt")
    ids, longest = inputs["input_ids"].to(session.device), longest_context(session.model)
    length = ids.shape[1]
    if not length:
        raise UserError("the prompt is empty")
    if length + tokens > longest:
        raise UserError(
            f"prompt and tokens are {length} + {tokens}; accepted are {longest}, the model's maximum"
        )
    engine = make_engine(session, caches, length + tokens)
    streamer = TextStreamer(session.tokenizer, skip_special_tokens=True)
    streamer.put(ids[0].cpu())
    made, clock = 0, time.perf_counter()
    first = clock
    for token in stream(engine, session, ids, tokens):
        if not made:
            first = time.perf_counter()
        made += 1
        streamer.put(token)
    streamer.end()
    end = time.perf_counter()
    speed = f", {(made - 1) / (end - first):.1f} tokens/s" if made > 1 else ""
    memory = getattr(engine.cache, "memory", None)
    held = f", cache {memory()['total'] / 1024:.0f} KiB" if memory else ""
    print(
        f"{made} tokens, the first after {1e3 * (first - clock):.0f} ms{speed}{held} ({config.cache.kind})",
        file=sys.stderr,
    )


def make_engine(session: Session, caches: Caches, length: int) -> Engine:
    """The engine with the job's cache, dense ones static where the model allows it."""
    cache = caches("exact")
    if type(cache) is DynamicCache:
        try:
            cache = DenseCache(session.model, length)
        except UserError:  # sliding windows: transformers' own cache serves them
            pass
    return Engine(session.model, cache, bucket=DENSE_BUCKET if session.device.type == "cuda" else 1)


def stream(engine: Engine, session: Session, ids, tokens: int) -> Iterator:
    """The new tokens of one sequence as tensors of one element, up to its end."""
    import torch

    eos = session.model.generation_config.eos_token_id
    ends = [session.tokenizer.eos_token_id] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for (token,) in engine.generate(ids, max_new_tokens=tokens, eos=[e for e in ends if e is not None]):
        yield torch.tensor([token])
