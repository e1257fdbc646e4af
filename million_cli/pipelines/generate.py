"""`million generate`: continue a prompt with the job's cache, streaming, through the engine."""

from __future__ import annotations

import sys
import time

import torch
from transformers import DynamicCache, TextStreamer

from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.models import full_attention_layers
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.session import Session
from million_cli.tasks.base import longest_context

DENSE_BUCKET = 256
"""Tokens by which a dense cache grows on a GPU: a graph for each length would take longer than it saves."""


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
    times = [time.perf_counter()]
    for (token,) in engine.generate(ids, max_new_tokens=tokens, eos=ends_of(session)):
        times.append(time.perf_counter())
        streamer.put(torch.tensor([token]))
    streamer.end()
    made = len(times) - 1
    speed = f", {(made - 1) / (times[-1] - times[1]):.1f} tokens/s" if made > 1 else ""
    memory = getattr(engine.cache, "memory", None)
    held = f", cache {memory()['total'] / 1024:.0f} KiB" if memory else ""
    first = f"the first after {1e3 * (times[1] - times[0]):.0f} ms"
    print(f"{made} tokens, {first}{speed}{held} ({config.cache.kind})", file=sys.stderr)


def make_engine(session: Session, caches: Caches, length: int) -> Engine:
    """The engine with the job's cache; a dense one is static if every layer has full attention."""
    cache = caches("exact")
    layers = session.model.config.get_text_config(decoder=True).num_hidden_layers
    if type(cache) is DynamicCache and len(full_attention_layers(session.model.config)) == layers:
        cache = DenseCache(session.model, length)
    return Engine(session.model, cache, bucket=DENSE_BUCKET if session.device.type == "cuda" else 1)


def ends_of(session: Session) -> list[int]:
    """The tokens that end a text."""
    ends = session.model.generation_config.eos_token_id
    ends = [session.tokenizer.eos_token_id] if ends is None else ends
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
