"""`million generate`: continue a prompt with the job's cache, streaming, through the engine."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, TextStreamer

from million_cli.engine.dense import engine_cache
from million_cli.engine.engine import Engine
from million_cli.engine.sampler import Sampler
from million_cli.errors import UserError
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.prompt import encode_prompt
from million_cli.pipelines.session import Session
from million_cli.tasks.answers import stop_tokens
from million_cli.tasks.base import longest_context

DENSE_BUCKET = 256
"""Tokens by which a dense cache grows on a GPU: a graph for each length would take longer than it saves."""

NO_CHOICE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "_from_model_config"),
    *("output_attentions", "output_hidden_states", "return_dict_in_generate"),
)
"""Fields of a generation configuration that do not change which token is chosen; `eos_token_id` is obeyed."""


@dataclass(frozen=True)
class Generation:
    """The settings of `million generate`, beside the job's model and cache.

    Attributes:
        tokens: at most so many new tokens.
        chat: see `prompt.encode_prompt`.
        temperature: 0 takes the most likely token; above 0, tokens are drawn.
        top_p: draw among the most likely tokens that hold this much probability; 1 draws among all.
        seed: of the draws.

    Raises:
        UserError: a value out of range, or `top_p` without a temperature.
    """

    tokens: int = 64
    chat: bool | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.sampler
        if self.temperature == 0 and self.top_p != 1:
            raise UserError(f"top_p={self.top_p:g}: accepted with a temperature above 0")

    @property
    def sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, top_p=self.top_p)

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        return f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"


def generate(config: JobConfig, prompt: str, generation: Generation) -> None:
    """Print the continuation as it comes: after the prompt itself, or after a chat template alone.

    Settings, speed and the cache's memory go to stderr.

    Raises:
        UserError: more tokens than the model takes, or a chat template that fails or does not exist.
    """
    session = Session(config)
    caches = Caches(session)
    ids, chat = encode_prompt(session.tokenizer, prompt, generation.chat)
    length, longest = ids.shape[1], longest_context(session.model)
    if not length:
        raise UserError("the prompt is empty")
    if length + generation.tokens > longest:
        raise UserError(
            f"prompt and tokens are {length} + {generation.tokens}; "
            f"accepted are {longest}, the model's maximum"
        )
    for line in settings(session.model, generation, chat):
        print(line, file=sys.stderr)
    engine = make_engine(session, caches, length + generation.tokens, generation.sampler)
    streamer = TextStreamer(session.tokenizer, skip_prompt=chat, skip_special_tokens=True)
    streamer.put(ids[0])
    torch.manual_seed(generation.seed)
    ends = stop_tokens(session.model, session.tokenizer)
    times = [time.perf_counter()]
    for (token,) in engine.generate(ids.to(session.device), max_new_tokens=generation.tokens, eos=ends):
        times.append(time.perf_counter())
        streamer.put(torch.tensor([token]))
    streamer.end()
    made = len(times) - 1
    speed = f", {(made - 1) / (times[-1] - times[1]):.1f} tokens/s" if made > 1 else ""
    memory = getattr(engine.cache, "memory", None)
    held = f", cache {memory()['total'] / 1024:.0f} KiB" if memory else ""
    first = f"the first after {1e3 * (times[1] - times[0]):.0f} ms"
    print(f"{made} tokens, {first}{speed}{held} ({config.cache.kind})", file=sys.stderr)


def settings(model: PreTrainedModel, generation: Generation, chat: bool) -> list[str]:
    """Lines that state how tokens are chosen, and which of the model's own settings are not applied."""
    lines = [f"decoding: {generation}"]
    if chat:
        lines.append("prompt: in the tokenizer's chat template (--no-chat continues it as it is)")
    own = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    left = [f"{name}={value}" for name, value in sorted(own.items()) if name not in NO_CHOICE]
    if left:
        lines.append(f"not applied from the model's generation configuration: {', '.join(left)}")
    return lines


def make_engine(session: Session, caches: Caches, length: int, sampler: Sampler | None = None) -> Engine:
    """The engine with the job's cache for `length` tokens."""
    cache = caches("exact")
    if type(cache) is DynamicCache:
        cache = engine_cache(session.model, length)
    bucket = DENSE_BUCKET if session.device.type == "cuda" else 1
    return Engine(session.model, cache, sampler=sampler, bucket=bucket)
