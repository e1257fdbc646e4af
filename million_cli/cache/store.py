"""The common part of both stores: a coded prefix and an exact residual window a layer, by one closed form.

After every append, and after every other operation, a layer of `length` tokens holds exactly
`WindowSpec.coded_length(length)` tokens as codes and the rest exactly.  Subclasses own the codes only.
Long because all operations keep this invariant over the same windows, lengths and codes.

Letters: B batch, Hkv KV heads, N new tokens, D head_dim, M subspaces, P page size, R residual window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from million_cli.cache.code_hooks import CodeHooks
from million_cli.cache.device_lengths import DeviceLengths
from million_cli.cache.indices import check_indices
from million_cli.cache.modes import plain_no_grad
from million_cli.cache.side_stream import SideStream
from million_cli.cache.view import KVView, Prefill, boundaries_of
from million_cli.cache.window import ResidualWindow
from million_cli.errors import UserError
from million_cli.ops.codes import CodeReader
from million_cli.ops.store_ops import DeviceLayer, StoreOps, run_operation
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import decode, encode, find_encoder
from million_cli.spec import PQSpec, WindowSpec

PREFILLS: tuple[Prefill, ...] = ("exact", "quantized")


@dataclass
class LayerState:
    """One layer: its quantizers, its window (None until the first append) and its token count."""

    keys: LayerPQ
    values: LayerPQ
    window: ResidualWindow | None = None
    length: int = 0
    key_map: Tensor | None = None  # of `DeviceLayer`, for the block of positions `mapped`
    mapped: int = -1


class CodeStore(CodeHooks):
    """A KV cache of B sequences of one uniform length a layer; see the module's docstring for the invariant.

    Tensors are allocated at the first append, when batch, heads, dtype and device are known.  Layers are
    independent in length, so that a forward pass can append to them one after the other.  Inference only:
    nothing here carries gradients.

    Args:
        layers: (keys, values) of each layer, in the codebook's order.
        window: page size and residual window.
        prefill: what the queries of an append of N > 1 tokens see.  "exact": codes of the tokens that were
            coded before, exact vectors of all others, the new ones included.  "quantized": each query sees
            the state after its own token, as if tokens were appended one by one.  An append of one token is
            a decode step in both modes: the query sees the state after the append.
        encoder: finds nearest centroids where no compiled operation does.
        ops: compiled operations that encode, append and attend in place of torch and say how codes are laid
            out.  Setting the attribute to None later continues in torch over the same tensors.

    Raises:
        UserError: prefill is neither "exact" nor "quantized", or the encoder is not available here.
    """

    def __init__(
        self,
        layers: Sequence[tuple[LayerPQ, LayerPQ]],
        window: WindowSpec | None = None,
        *,
        prefill: Prefill = "exact",
        encoder: str = "torch",
        ops: StoreOps | None = None,
    ) -> None:
        if prefill not in PREFILLS:
            raise UserError(f"prefill={prefill!r}: accepted are {', '.join(PREFILLS)}")
        find_encoder(encoder)
        assert layers
        self.window = window or WindowSpec()
        self.prefill: Prefill = prefill
        self.encoder = encoder
        self.ops = ops
        self.batch: int | None = None
        self._expected = 0  # tokens a sequence that will be codes in the end
        self._layers = [LayerState(keys, values) for keys, values in layers]
        self.lengths = DeviceLengths()
        self._side_stream = SideStream()

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def specs(self) -> list[PQSpec]:
        """The codes of each layer."""
        return [PQSpec(state.keys.spec, state.values.spec) for state in self._layers]

    @property
    def bits(self) -> float:
        """Nominal code bits per element, mean of keys and values; window and codebooks are not in it."""
        return fmean(spec.bits_per_element for spec in self.specs)

    @property
    def quantizers(self) -> list[tuple[LayerPQ, LayerPQ]]:
        """Quantizers (keys, values) of each layer, on its device after its first append."""
        return [(state.keys, state.values) for state in self._layers]

    def length(self, layer: int = 0) -> int:
        """Tokens a sequence held by a layer."""
        return self._layers[layer].length

    def coded(self, layer: int = 0) -> int:
        """Tokens a sequence that a layer holds as codes (a whole number of pages)."""
        return self.window.coded_length(self._layers[layer].length)

    def codes(self, layer: int) -> tuple[CodeReader, CodeReader]:
        """Readers of the key and value codes of a layer that was appended to; valid until the next change."""
        self._side_stream.wait(layer)
        return self._readers(layer, self.coded(layer))

    def exact(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, length - coded, D]` of the window, oldest first."""
        state = self._layers[layer]
        assert state.window is not None
        return state.window.gather(self.coded(layer), state.length)

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors held, by use; codebooks are the caller's.

        key_codes, value_codes: pages or rows that hold tokens.  window: the rings, full or not, and the
        device's lengths.  block_table: host and device copies (0 when contiguous).  pool_reserved: allocated
        for codes, not in use.
        """
        window = sum(state.window.nbytes for state in self._layers if state.window is not None)
        window += self.lengths.nbytes
        codes = self._code_bytes()
        return {**codes, "window": window, "total": sum(codes.values()) + window}

    # -- changing --------------------------------------------------------------------------------------------

    @plain_no_grad
    def append(self, layer: int, k: Tensor, v: Tensor) -> KVView:
        """Append N tokens to a layer and encode the pages that are complete.

        Args:
            k, v: `[B, Hkv, N, D]` of one floating dtype, keys after RoPE; padding tokens included.

        Returns:
            The keys and values that the N new queries attend to.

        Raises:
            UserError: the batch differs from that of earlier appends, or the encoder is not available here.
            PagePoolExhausted: (paged) no room for the new pages; nothing has changed, in any layer.
            KernelFailed: an operation of `ops` failed; repeat the append in torch (`ops` None).
        """
        state = self._layers[layer]
        B, _, N, D = k.shape
        assert k.shape == v.shape, (k.shape, v.shape)
        assert N > 0, k.shape
        assert state.keys.spec.head_dim == D, k.shape
        if self.batch is not None and self.batch != B:
            raise UserError(f"batch={B}: this cache holds a batch of {self.batch}; reset it first")
        start, end = state.length, state.length + N
        self._side_stream.wait(layer)
        self._reserve(layer, self.window.coded_length(end), k)  # an exhausted pool shows before any change
        if state.window is None:
            state.window = ResidualWindow(k, self.window.residual)
            if state.keys.centroids.device != k.device:
                state.keys, state.values = state.keys.to(k.device), state.values.to(k.device)
        self.batch = B
        device_layer = None
        if N == 1 and self.ops is not None:
            self._map_keys(layer, start)
            device_layer = self.device_layer(layer, self.lengths.hold(k.device, B, end))
            run_operation(self.ops.append, device_layer, k[:, :, 0], v[:, :, 0])
        elif N == 1:
            self._append_token(layer, k, v)
        else:
            exact_k, exact_v = self._append_tokens(layer, k, v)
        state.length = end

        boundaries = boundaries_of(self.window, self.prefill, start, end)
        key_codes, value_codes = self._readers(layer, boundaries[-1])
        if N == 1:
            exact = partial(state.window.gather, boundaries[0], end)
        else:
            skipped = boundaries[0] - self.window.coded_length(start)
            exact = partial(_slices, exact_k, exact_v, skipped)
        codes = (key_codes, value_codes, state.keys, state.values)
        return KVView(*codes, exact, boundaries[0], end, boundaries, device_layer)

    def _append_token(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the next token; encode the window's oldest page if that makes it due."""
        state = self._layers[layer]
        assert state.window is not None
        start = state.length
        coded, coded_after = self.window.coded_length(start), self.window.coded_length(start + 1)
        state.window.write(start, k, v)
        if coded_after > coded:  # a residual window above P, so the page ends before the new token
            self._encode(layer, coded, *state.window.gather(coded, coded_after))

    def _append_tokens(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next N tokens; returns all exact and new vectors from before pages are encoded."""
        state = self._layers[layer]
        assert state.window is not None
        start, end = state.length, state.length + k.shape[2]
        coded, coded_after = self.window.coded_length(start), self.window.coded_length(end)
        keys, values = state.window.read(coded, start)
        exact_k = torch.cat([*keys, k], dim=2) if keys else k  # tokens coded .. end - 1
        exact_v = torch.cat([*values, v], dim=2) if values else v
        if coded_after > coded:
            n = coded_after - coded
            self._encode(layer, coded, exact_k[:, :, :n], exact_v[:, :, :n])
        kept = max(coded_after - start, 0)
        state.window.write(start + kept, k[:, :, kept:], v[:, :, kept:])
        return exact_k, exact_v

    def _encode(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Encode `[B, Hkv, n, D]`, whole pages, as the tokens start .. start + n - 1."""
        state = self._layers[layer]
        if self.ops is not None:
            work = partial(run_operation, self.ops.encode, self.device_layer(layer), k, v, start)
            if self.prefill == "exact":  # no query sees these codes before the layer's next append
                self._side_stream.run(layer, work, (k, v))
            else:
                work()
            return
        key_codes, value_codes = (
            encode(k, state.keys, self.encoder, start),
            encode(v, state.values, self.encoder),
        )
        self._write(layer, start, key_codes, value_codes)

    @plain_no_grad
    def attend(
        self, query: Tensor, view: KVView, *, scale: float, first_valid: Tensor | None = None
    ) -> Tensor:
        """Attention of the newest token, `query [B, Hq, 1, D]`, by `ops`; see `cache.view.attend`.

        first_valid: int32 `[B]` on the device, tokens before it (left padding) are not seen.

        Raises:
            KernelFailed: the compiled operation failed.
        """
        assert self.ops is not None
        assert view.device_layer is not None
        output = run_operation(
            self.ops.attend, query.squeeze(2), view.device_layer, scale=scale, first_valid=first_valid
        )
        return output.unsqueeze(2)

    @plain_no_grad
    def restore(self, layer: int, codes: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
        """Let an empty layer hold codes `[B, Hkv, coded, M]` and, after them, exact vectors `[B, Hkv, E, D]`.

        Keys and values each.  Raises PagePoolExhausted as `append`.
        """
        state, coded, like = self._layers[layer], codes[0].shape[2], exact[0]
        length = coded + like.shape[2]
        assert not state.length and coded == self.window.coded_length(length), (coded, length)  # noqa: PT018
        self._reserve(layer, coded, like)
        self.batch, state.length = like.shape[0], length
        state.window = ResidualWindow(like, self.window.residual)
        state.window.write(coded, *exact)
        state.keys, state.values = state.keys.to(like.device), state.values.to(like.device)
        if coded:
            self._write(layer, 0, *codes)

    # -- reserved memory, and the device's view --------------------------------------------------------------

    def expect(self, length: int) -> None:
        """Before the first append: allocate memory for a text of `length` tokens at once."""
        self._expected = self.window.coded_length(length)

    @plain_no_grad
    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a sequence, without waiting for the device.

        Raises:
            PagePoolExhausted: (paged) no room for new pages; nothing has changed.
            UserError: a layer was not appended to.
        """
        for layer, state in enumerate(self._layers):
            if state.window is None:
                raise UserError(f"reserve({length}): accepted once every layer has been appended to")
            self._reserve(layer, self.window.coded_length(length), state.window.keys)
        self._code_tensors(0)  # the device's copy of a block table that has changed

    def is_reserved(self, length: int) -> bool:
        """Whether there is room for a step to `length` tokens; a crop or another batch takes it away."""
        coded = self.window.coded_length(length)
        return all(self._is_reserved(layer, coded) for layer in range(self.num_layers))

    def device_layer(self, layer: int, lengths: Tensor | None = None) -> DeviceLayer:
        """A layer that was appended to, as the compiled operations see it.

        Args:
            lengths: int32 `[B]` on the layer's device; None: the host's length of the layer.
        """
        state = self._layers[layer]
        assert state.window is not None
        assert self.batch is not None
        codes, window = self._code_tensors(layer), state.window
        if lengths is None:
            lengths = self.lengths.hold(window.keys.device, self.batch, state.length)
        P = self.window.page_size
        tensors = (*codes, window.keys, window.values, lengths)
        return DeviceLayer(state.keys, state.values, *tensors, P, state.key_map)

    def prepare_steps(self, ahead: int = 0) -> None:
        """Prepare a step of `ops`; the device holds `ahead` tokens more than the host has counted."""
        for layer, state in enumerate(self._layers):
            self._map_keys(layer, state.length + ahead)

    def _map_keys(self, layer: int, length: int) -> None:
        """Update the map for the page that a layer of `length` tokens encodes next, in place."""
        state = self._layers[layer]
        pq = state.keys
        if pq.rebase is None or self.ops is None:
            return
        block = self.window.coded_length(length) // pq.rebase.every
        if block == state.mapped:
            return
        made = pq.rebase.matrix(block, pq.spec.head_dim).to(pq.centroids.device)[None]
        if pq.transform is not None:
            made = made @ pq.transform.encode.float()
        if state.key_map is None:
            state.key_map = made.contiguous()
        else:
            state.key_map.copy_(made)
        state.mapped = block

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in every layer, on the host; the reserved tensors already hold them."""
        for state in self._layers:
            state.length += tokens

    def wait(self) -> None:
        """Let later work on each device wait for the codes that are being encoded on its side stream."""
        self._side_stream.wait()

    @plain_no_grad
    def reset(self, release: bool = True) -> None:
        """Forget all tokens; with `release` all tensors too.

        Without it the tensors keep their addresses, as captured CUDA graphs need, and the next text must have
        the same batch size.
        """
        self._side_stream.wait()
        for state in self._layers:
            state.length = 0
            if release:
                state.window = None
        self._truncate()
        if release:
            self.batch, self._expected = None, 0
            self.lengths.forget()
            self._release()

    @plain_no_grad
    def crop(self, length: int) -> None:
        """Keep the oldest `length` tokens of every layer (shorter layers stay); UserError if it is below 0.

        Where this cuts into the coded part, the closed form makes some coded tokens exact: they are decoded
        into the window, in the model's dtype, with their coding error.  A decoded vector encodes to the code
        it came from, unless rounding to a half-precision dtype brings it nearer to another centroid.
        """
        if length < 0:
            raise UserError(f"crop({length}): accepted are lengths from 0")
        self._side_stream.wait()
        for layer, state in enumerate(self._layers):
            new = min(length, state.length)
            coded, coded_after = self.coded(layer), self.window.coded_length(new)
            stop = min(coded, new)
            if coded_after < stop:
                assert state.window is not None
                keys, values = self._readers(layer, coded)
                dtype = state.window.keys.dtype
                state.window.write(
                    coded_after,
                    decode(keys.read(coded_after, stop), state.keys, dtype, start=coded_after),
                    decode(values.read(coded_after, stop), state.values, dtype),
                )
            state.length = new
        self._truncate()

    def reorder(self, beam_idx: Tensor) -> None:
        """Sequence i becomes a copy of sequence beam_idx[i] (`[B]` integers), as beam search asks.

        Raises:
            UserError: another number of indices than of sequences, or an index out of range.
            PagePoolExhausted: (paged, within a forward pass) no room for copies; nothing has changed.
        """
        if self.batch not in (None, len(beam_idx)):
            raise UserError(f"reorder of {len(beam_idx)} sequences: this cache holds {self.batch}")
        self._take(beam_idx)

    def select(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (any number, repeats allowed), in that order; raises as `reorder`."""
        self._take(indices)

    def repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` >= 1 neighbouring copies; raises as `reorder`."""
        if repeats < 1:
            raise UserError(f"repeat_interleave({repeats}): accepted are integers from 1")
        if self.batch is not None:
            self._take(torch.arange(self.batch).repeat_interleave(repeats))

    @plain_no_grad
    def _take(self, indices: Tensor) -> None:
        if self.batch is None:
            return
        check_indices(indices, self.batch)
        self._side_stream.wait()
        self._take_codes(indices)  # first, as it may fail
        for state in self._layers:
            if state.window is not None:
                state.window.take(indices)
        self.batch = len(indices)


def _slices(k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
    return k[:, :, first:], v[:, :, first:]
