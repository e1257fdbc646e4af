"""Prefill and decode steps of one model with one cache, each step one replay of a CUDA graph.

The first step of a text runs uncaptured, as a warm-up; the second is captured, from embedding to sampled
token, and replayed from then on.  The model is transformers' own: it gets a cache of `step_cache` and attends
through the registered function.  Where steps cannot be captured (on a CPU) the same steps run one by one.
With a cache that has no steps, the model's forward runs with that cache.

Long because prompt, steps and capture share the tensors that a captured graph reads.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.cache.modes import plain_no_grad
from million_cli.engine.dense import DenseCache, DenseSteps
from million_cli.engine.graphs import CudaGraphs, Graph, Graphs
from million_cli.engine.joined import join_projections
from million_cli.engine.readback import Readback
from million_cli.engine.sampler import Sampler
from million_cli.errors import UserError
from million_cli.hf.compat import embedding_changes_at
from million_cli.hf.models import has_sinks, longest_text
from million_cli.hf.own_layers import reset_cache
from million_cli.hf.pq_cache import PQCache
from million_cli.hf.pq_steps import PQSteps, steps_reason
from million_cli.hf.step import Steps, padding_of_step, step_cache
from million_cli.hf.switch import pq_attention, use_pq_attention
from million_cli.hf.trial import parts_of, refuse_parts
from million_cli.ops.store_ops import KernelFailed

Compile = Literal["none", "default", "tuned"]
COMPILES: tuple[Compile, ...] = ("none", "default", "tuned")
LEAST_CHUNK = 256
"""Tokens of the smallest chunk of a prefill; if it does not fit, the error is raised."""

logger = logging.getLogger("million")


class Engine:
    """One text, or batch of texts, at a time.

    `prefill` and `generate` start a new text.  With `continue_text=True` they read the next turn of the text
    that the engine holds: the prompt and every token given out since, the newest included.  A cache that
    held tokens before the engine got it is either continued in this way or reset first, never added to
    by accident.

    Args:
        model: in evaluation mode, on one device; its attention function is ours during steps only.
        cache: a PQ cache, a `DenseCache`, or any other cache of transformers.
        sampler: chooses the next token.
        compile: how torch.compile, which fuses small kernels, compiles the step: "none", "default", or
            "tuned", which times variants of each kernel first.  Only for caches that have steps.  The model's
            projections of one input become one product (see `joined`).
        graphs: captures steps; None runs them one by one.  "auto" means CUDA graphs on a GPU.
        bucket: for a `DenseCache`, see `DenseSteps`.

    Attributes:
        steps: steps of the cache; None if it is used through its layers.
        notes: reasons why something is not as asked, each once.
        logits: `[B, V]` of the latest token; valid until the next step.
        chunk: tokens of a prefill's chunk; None if the prompt was read in one piece.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        sampler: Sampler | None = None,
        compile: Compile = "none",
        graphs: Graphs | Literal["auto"] | None = "auto",
        bucket: int = 1,
    ) -> None:
        if compile not in COMPILES:
            raise UserError(f"compile={compile}: accepted are {', '.join(COMPILES)}")
        self.model, self.cache, self.sampler = model, cache, sampler or Sampler()
        self.device = model.device
        self.notes: list[str] = []
        self.logits: Tensor | None = None
        self.chunk: int | None = None
        self.length = 0
        self._longest, self._parts = longest_text(model.config), parts_of(model)
        self._pending = False  # the newest token belongs to the text and is not in the cache yet
        self._uneven = False  # some sequences ended before others: the cache holds more than was given out
        self.steps = self._make_steps(bucket)
        if self.steps is not None:
            use_pq_attention(model)
            self._step_cache = step_cache(self.steps, len(cache.layers))
        self._forward: Callable[..., Any] = model
        if compile != "none" and self.steps is not None:
            join_projections(model)
            self._forward = _compile(model, compile)
        if graphs == "auto":
            graphs = CudaGraphs() if self.device.type == "cuda" and self.steps is not None else None
        self._graphs = graphs
        self._captured: dict[Hashable, tuple[Graph, Tensor]] = {}
        self._warm = self._static = False
        self._tokens = self._positions = self._mask = torch.empty(0)
        self._first_valid: Tensor | None = None

    def _make_steps(self, bucket: int) -> Steps | None:
        cache, config = self.cache, self.model.config.get_text_config(decoder=True)
        reason = None
        if getattr(config, "attn_logit_softcapping", None) is not None:
            reason = "softcapped scores"
        elif has_sinks(self.model):
            reason = "attention sinks"
        elif isinstance(cache, PQCache):
            reason = steps_reason(cache)
        elif not isinstance(cache, DenseCache):
            reason = f"a {type(cache).__name__}"
        if reason is not None:
            self._note(f"steps through the cache's layers: {reason}")
            return None
        if isinstance(cache, DenseCache):
            return DenseSteps(cache, config.num_attention_heads, self.device, bucket)
        assert isinstance(cache, PQCache)
        return PQSteps(cache, self.device)

    def _note(self, reason: str) -> None:
        if reason not in self.notes:
            self.notes.append(reason)
            logger.debug("engine: %s", reason)

    @property
    def mode(self) -> str:
        """How the latest steps ran: graph, steps (one by one) or layers (through the cache's layers)."""
        if self.steps is None:
            return "layers"
        return "graph" if self._captured else "steps"

    # -- the prompt ------------------------------------------------------------------------------------------

    @plain_no_grad
    def prefill(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        new_tokens: int = 0,
        chunk: int | None = None,
        continue_text: bool = False,
    ) -> Tensor:
        """Read a prompt: a new text, or with `continue_text` the next turn of the one that is held.

        In one piece, the prompt's K and V are attended to exactly; later chunks attend to earlier ones in
        quantised form.  A new text that does not fit into memory in one piece is read in the
        largest chunks that do, halved from its length.

        Args:
            ids: `[B, T]`; for a next turn the tokens that follow all tokens given out so far.
            attention_mask: `[B, T]` of 0 (padding, on the left) and 1, or None without padding.  A next turn
                has no padding of its own; after a cache that was filled elsewhere `[B, held + T]` tells the
                padding of the tokens it holds.
            new_tokens: steps that will follow, if known: memory is taken for them at once.
            chunk: tokens of a chunk; None reads the prompt in one piece if it fits.
            continue_text: continue the text that is held.

        Returns:
            The first new token of each sequence, `[B]`, on the device.

        Raises:
            UserError: padding that is not on the left, more tokens than the cache takes, a next turn without
                a text or after sequences that ended at different tokens, or a new text for a cache that
                was filled elsewhere.
        """
        B, T = ids.shape
        held = int(self.cache.get_seq_length())
        ids = ids.to(self.device)
        if continue_text:
            mask, first_valid = self._mask_of_next_turn(B, T, held, attention_mask)
            if self._pending:
                ids = torch.cat([self._tokens, ids], dim=1)
        else:
            if held and not self.length:
                raise UserError(
                    f"the cache already holds {held} tokens: continue_text=True goes on after them, "
                    "reset() forgets them"
                )
            mask, first_valid = _left_padding(attention_mask, T)
            self._forget(release=self._static and self._tokens.shape[0] != B)
            held = 0
        end = held + ids.shape[1]
        in_pieces = held or (chunk is not None and chunk < end)
        self._check_length((held or chunk or 0) if in_pieces else end, end)
        if mask is not None and mask.shape[1] < end:  # the newest token comes between mask and turn
            mask = F.pad(mask, (0, end - mask.shape[1]), value=True)
        while True:
            if self.steps is not None:
                self.steps.expect(end + new_tokens)
            try:
                logits = self._read(ids, mask, held, chunk or ids.shape[1])
                break
            except torch.OutOfMemoryError:
                self._forget(release=True)
                chunk = -(-(chunk or T) // 2)
                if chunk < LEAST_CHUNK or held:  # what was held is lost
                    raise
            except BaseException:
                self._forget(release=True)
                raise
            torch.cuda.empty_cache()
        self.chunk = chunk if chunk is not None and chunk < ids.shape[1] else None
        if self.chunk:
            self._note(f"prefill in chunks of {self.chunk}")
        token = self.sampler(logits)
        self._begin(end, first_valid, token)
        self.logits = logits
        self._pending, self._uneven = True, False
        return token

    def _check_length(self, held: int, end: int) -> None:
        """Raise if the model cannot read tokens up to `end` after the `held` ones in the cache."""
        refuse_parts(self._parts, self.model.config.model_type, held, end - held)
        if self._longest is not None and end > self._longest:
            raise UserError(
                f"{end} tokens: this model attends to the latest {self._longest}; accepted are fewer"
            )
        changes = embedding_changes_at(self.model.config)
        if changes is not None and held <= changes < end:
            raise UserError(
                f"{end} tokens: this model's rotary embedding changes at {changes} (longrope), which a cache "
                f"of {held} tokens cannot follow; accepted are texts on one side of that length"
            )

    def _mask_of_next_turn(
        self, B: int, T: int, held: int, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The result of `_left_padding` for the text that is held and a turn of T tokens."""
        if not held:
            raise UserError("continue_text=True: there is no text to continue; accepted is a new text")
        if self.length not in (0, held):
            raise UserError(
                f"the cache holds {held} tokens, the engine has read {self.length}: it was changed; "
                "reset() starts again"
            )
        if self._uneven:
            raise UserError(
                "continue_text=True: the sequences ended at different tokens; accepted is one length"
            )
        if self.length and self._tokens.shape[0] != B:
            raise UserError(f"batch={B}: the text that continues is a batch of {self._tokens.shape[0]}")
        if not self.length and attention_mask is not None and attention_mask.shape[1] == held + T:
            return _left_padding(attention_mask, held + T)
        if attention_mask is not None and (attention_mask.shape[1] != T or not bool(attention_mask.all())):
            raise UserError("attention_mask: accepted is a next turn without padding")
        if not self.length or self._first_valid is None:
            return None, None
        first_valid = self._first_valid.clone()
        return torch.arange(held + T, device=self.device) >= first_valid[:, None], first_valid

    def _read(self, ids: Tensor, mask: Tensor | None, held: int, chunk: int) -> Tensor:
        """Logits after `ids [B, T]`, which follow `held` tokens; mask: `[B, held + T]`."""
        T = ids.shape[1]
        positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)[:, held:]
        for start in range(0, T, chunk):
            stop = min(start + chunk, T)
            output = self.model(
                input_ids=ids[:, start:stop],
                attention_mask=None if mask is None else mask[:, : held + stop].to(self.device),
                position_ids=None if positions is None else positions[:, start:stop].to(self.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    @plain_no_grad
    def begin(self, length: int, token: Tensor) -> None:
        """Continue from a cache that was filled elsewhere with `length` tokens a sequence, without padding.

        Args:
            token: `[B]` on the device, the next input.
        """
        self._begin(length, None, token)

    def reset(self) -> None:
        """Forget the text; memory and graphs are kept for a next text of the same batch size."""
        self._forget(release=False)

    @plain_no_grad
    def _forget(self, release: bool) -> None:
        """As `reset`, with `release` also the memory."""
        if isinstance(self.cache, PQCache):
            self.cache.reset(release=release or self.steps is None)
        else:
            reset_cache(self.cache)
        self.length = 0
        self._pending = self._uneven = False

    def _begin(self, length: int, first_valid: Tensor | None, token: Tensor) -> None:
        """Set the static tensors of the steps; a next text of the same form uses the same tensors."""
        self.length = length
        positions = torch.full((token.shape[0], 1), length, dtype=torch.int64, device=self.device)
        if first_valid is not None:
            first_valid = first_valid.to(self.device)
            positions -= first_valid[:, None]
        mask = padding_of_step(first_valid, self.device)
        if self._static and self._mask.shape == mask.shape and self._positions.shape == positions.shape:
            self._tokens.copy_(token[:, None])
            self._positions.copy_(positions)
            self._mask.copy_(mask)
        else:
            self._tokens, self._positions, self._mask = token[:, None].clone(), positions, mask.clone()
            self._captured, self._warm, self._static = {}, False, True
        self._first_valid = None if first_valid is None else self._mask[:, 0, 0, 0]
        if self.steps is not None:
            self.steps.begin(self._first_valid)

    # -- the steps -------------------------------------------------------------------------------------------

    @plain_no_grad
    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Append the latest token, or `tokens [B]` in its place, and make the next.

        Returns:
            The next token of each sequence, `[B]`, on the device; the host does not wait for it.  Valid until
            the next step.

        Raises:
            UserError: no text, more tokens than the cache takes, a cache that was changed elsewhere, or a
                strict cache that would have to fall back.
        """
        if not self.length:
            raise UserError("step: there is no text yet; prefill reads one")
        held = self.cache.get_seq_length()
        if isinstance(held, int) and held != self.length:  # a tensor is on the device: not waited for
            raise UserError(
                f"the cache holds {held} tokens, the engine has read {self.length}: it was changed; "
                "reset() starts again"
            )
        self._check_length(self.length, self.length + 1)
        batch = self._tokens.shape[0]
        if isinstance(self.cache, PQCache) and self.cache.store.batch != batch:
            raise UserError(f"the cache holds a batch of {self.cache.store.batch}, the engine one of {batch}")
        if tokens is not None:
            self._tokens.copy_(tokens[:, None])
        key = self.steps.ready() if self.steps is not None else None
        if self.steps is None or key is None:
            self._layers_step()
        elif self._graphs is not None and self._warm and self._capture(key):
            graph, self.logits = self._captured[key]
            graph.replay()
            self.steps.advance()
        else:
            self._step(key)
        self.length += 1
        self._pending = True
        return self._tokens[:, 0]

    @plain_no_grad
    def capture(self, steps: int) -> None:
        """Capture the graphs of the next `steps` steps, after a first step; a dense cache needs one a length.

        With a dense cache the graphs are also replayed once, as a first launch takes longer, and undone.
        """
        if self._graphs is None or self.steps is None or not self._warm:
            return
        if not isinstance(self.steps, DenseSteps):
            key = self.steps.ready()
            if key is not None:
                self._capture(key)
            return
        start = self.length
        before = self._tokens.clone(), self._positions.clone()
        for _ in range(steps):
            self.step()
        self.steps.rewind(start)
        self.length = start
        self._tokens.copy_(before[0]), self._positions.copy_(before[1])

    def _capture(self, key: Hashable) -> bool:
        """Capture a graph for `key` unless there is one; False if steps cannot be captured."""
        if key in self._captured:
            return True
        assert self.steps is not None
        assert self._graphs is not None
        self.steps.prepare(key)
        if isinstance(self.steps, PQSteps):
            self._captured.clear()  # its tensors have moved
        try:
            graph = self._graphs.capture(self._launch)
        except (RuntimeError, KernelFailed) as error:
            self._note(f"steps one by one: they cannot be captured: {str(error).splitlines()[0]}")
            self._graphs, self._captured = None, {}
            return False
        assert self.logits is not None
        self._captured[key] = graph, self.logits
        return True

    def _launch(self) -> None:
        """One step over static tensors; no decision here depends on values on the device."""
        with pq_attention(self.model):
            self.logits = self._forward(
                input_ids=self._tokens,
                position_ids=self._positions,
                attention_mask=self._mask,
                past_key_values=self._step_cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        self._tokens.copy_(self.sampler(self.logits)[:, None])
        self._positions.add_(1)

    def _step(self, key: Hashable) -> None:
        assert self.steps is not None
        try:
            self.steps.prepare(key)
            self._launch()
        except KernelFailed as error:
            assert isinstance(self.steps, PQSteps)
            self.steps.failed(error)
            self._layers_step()
            return
        self.steps.advance()
        self._warm = True

    def _layers_step(self) -> None:
        """One step through the cache's layers."""
        if self.steps is not None:
            self.steps, self._captured = None, {}
            self._note("steps through the cache's layers: the kernels were given up")
        mask = None
        if self._first_valid is not None:
            mask = torch.arange(self.length + 1, device=self.device) >= self._first_valid[:, None]
        self.logits = self.model(
            input_ids=self._tokens,
            position_ids=self._positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._tokens.copy_(self.sampler(self.logits)[:, None])
        self._positions.add_(1)

    # -- both ------------------------------------------------------------------------------------------------

    def generate(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos: Sequence[int] = (),
        pad: int = 0,
        continue_text: bool = False,
    ) -> Iterator[list[int]]:
        """Yield the new tokens of all sequences, step by step.

        The host is one step behind the device, so that the device never waits.  A sequence that has ended is
        filled with `pad`; the iteration ends when all have ended.

        Args:
            ids, attention_mask, continue_text: as for `prefill`.
            max_new_tokens: the most tokens of each sequence, at least 1.
            eos: tokens that end a sequence.
            pad: the token of sequences that have ended.

        Raises:
            UserError: as for `prefill` and `step`.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: accepted are integers from 1")
        token = self.prefill(ids, attention_mask, new_tokens=max_new_tokens - 1, continue_text=continue_text)
        readback = Readback(token)
        readback.send(token)
        alive = [True] * ids.shape[0]
        for made in range(max_new_tokens):
            ahead = made + 1 < max_new_tokens
            if ahead:
                readback.send(self.step())
            self._pending = not ahead  # the token of the step ahead is not given out
            self._uneven = not all(alive)
            tokens = [
                token if living else pad for token, living in zip(readback.receive(), alive, strict=True)
            ]
            yield tokens
            alive = [living and token not in eos for living, token in zip(alive, tokens, strict=True)]
            if not any(alive):
                return


def _left_padding(mask: Tensor | None, T: int) -> tuple[Tensor | None, Tensor | None]:
    """(mask, first valid position int32 `[B]`), both None without padding.

    Raises:
        UserError: padding that is not on the left.
    """
    if mask is None:
        return None, None
    mask = mask.bool()
    first_valid = (T - mask.sum(-1)).int()
    if not torch.equal(torch.arange(T, device=mask.device) >= first_valid[:, None], mask):
        raise UserError("attention_mask: accepted is padding on the left")
    if not bool(first_valid.any()):
        return None, None
    return mask, first_valid


def _compile(model: PreTrainedModel, how: Compile) -> Callable[..., Any]:
    """The model's forward compiled for steps, once a model: all caches share it."""
    # Kept by the model, as transformers keeps its own: what is compiled refers to the model and goes with it.
    known: dict[Compile, Callable[..., Any]] = model.__dict__.setdefault("_million_steps", {})
    if how not in known:
        # Batches are shapes of their own, each a compilation.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if how == "tuned" else None
        known[how] = torch.compile(model.forward, fullgraph=True, dynamic=False, options=options)
    return known[how]
