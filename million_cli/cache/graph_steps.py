"""Decode steps of a store for CUDA graphs: launches over tensors whose addresses stay the same.

Letters: B batch, Hq/Hkv query and KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from million_cli.cache.modes import plain_no_grad
from million_cli.cache.store import CodeStore
from million_cli.ops.store_ops import run_operation


@dataclass(frozen=True)
class GraphSteps:
    """Steps of one token over a store that compiled operations serve; all state is the store's.

    The device counts tokens for itself while steps are replayed: `begin`, then `step` for each layer in order
    and `advance` after the last one.

    Args:
        store: a store with `ops`, whose layers have all been appended to.
    """

    store: CodeStore

    def begin(self) -> None:
        """Update the device's lengths; all layers hold the same tokens.

        Raises:
            PagePoolExhausted: see `CodeStore.reserve`.
        """
        store = self.store
        assert len({store.length(layer) for layer in range(store.num_layers)}) == 1
        store.wait()
        store.reserve(store.length() + 1)
        store.prepare_steps()
        for layer in range(store.num_layers):
            store.device_layer(layer)

    @plain_no_grad
    def step(
        self, layer: int, query: Tensor, k: Tensor, v: Tensor, *, scale: float, first_valid: Tensor | None
    ) -> Tensor:
        """One layer of a step: append a token and attend to all.

        The first layer counts the token on the device; the host's counts stay.  The caller has reserved room.

        Args:
            query: `[B, Hq, D]`; k, v: `[B, Hkv, D]`.
            first_valid: int32 `[B]` on the device, tokens before it (left padding) are not seen.

        Returns:
            `[B, Hq, D]` in the query's dtype.

        Raises:
            KernelFailed: an operation failed; the host's counts are those before the step.
        """
        ops = self.store.ops
        assert ops is not None
        lengths = self.store.lengths.on(k.device)
        if layer == 0:
            lengths.add_(1)
        device_layer = self.store.device_layer(layer, lengths)
        run_operation(ops.append, device_layer, k, v)
        output: Tensor = run_operation(ops.attend, query, device_layer, scale=scale, first_valid=first_valid)
        return output

    def advance(self, steps: int = 1) -> None:
        """Count `steps` whole steps on the host, which have been launched on the device."""
        self.store.advance(steps)
        self.store.lengths.advance(steps)

    def device_length(self) -> Tensor:
        """Tokens a sequence as the device counts them, int32 of no dimensions."""
        return self.store.lengths.tensors()[0][0]

    def prime(self, query_heads: int) -> None:
        """Let the operations allocate the buffers that they keep between steps; changes no token."""
        ops = self.store.ops
        assert ops is not None
        for layer in range(self.store.num_layers):
            device_layer = self.store.device_layer(layer)
            B, _, _, D = device_layer.key_window.shape
            query = device_layer.key_window.new_zeros(B, query_heads, D)
            run_operation(ops.attend, query, device_layer, scale=1.0, first_valid=None)

    def places(self) -> tuple[int, ...]:
        """Addresses of all tensors of a step: a captured step can be replayed while they are equal."""
        tensors: list[Tensor | None] = [*self.store.lengths.tensors()]
        for layer in range(self.store.num_layers):
            of = self.store.device_layer(layer)
            tensors += [of.key_codes, of.value_codes, of.block_table, of.key_window, of.value_window]
            tensors.append(of.key_map)
        return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)
