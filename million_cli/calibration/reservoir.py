"""A uniform sample of K and V over all tokens ever seen, in bounded memory."""

from __future__ import annotations

import numpy as np
import torch

from million_cli.errors import UserError


class Reservoir:
    """Bottom-n sampling of one layer: each token draws a 64-bit priority, and the n smallest are kept.

    Priorities are independent and uniform, so every n-subset of the tokens is equally likely (Cohen and
    Kaplan 2007, "Summarizing data using bottom-k sketches").  The i-th token's priority is the i-th output
    of a counter-based generator (Philox) keyed by (seed, layer), which makes the sample a function of the
    seed and of the sequence of tokens alone: it depends neither on how the sequence was cut into chunks nor
    on where a run was interrupted, and the state to resume from is the number of tokens seen.  All heads of
    the layer keep the same tokens.

    In a batch the tokens count in order of position first, batch row second.

    Args:
        capacity: n, the most tokens to keep.
        seed: of the run, >= 0.
        layer: the layer's index, for a choice of its own and for messages.
    """

    def __init__(self, capacity: int, seed: int, layer: int) -> None:
        assert capacity > 0
        assert seed >= 0
        self.capacity = capacity
        self.seen = 0
        self._layer = layer
        self._philox_key = (seed, layer)
        self._generator = np.random.Philox(key=self._philox_key)
        self._priorities = np.empty(0, dtype=np.uint64)
        self._numbers = np.empty(0, dtype=np.int64)
        self._positions = np.empty(0, dtype=np.int64)
        self._keys: torch.Tensor | None = None  # [Hkv, capacity, D] on the CPU, slots in no order
        self._values: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None  # [2, Hkv, capacity] of keys and values

    def __len__(self) -> int:
        return len(self._priorities)

    def add(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        squares: torch.Tensor | None = None,
    ) -> None:
        """Offer the tokens of a chunk.

        Args:
            keys: `[B, Hkv, N, D]`, any floating dtype and device; kept in that dtype on the CPU.
            values: `[B, Hkv, N, D]`.
            mask: `[B, N]` bool, False for padding, which is neither counted nor kept; None keeps all.
            positions: `[B, N]` or `[1, N]` int64, each token's position in its text, which RoPE has turned
                its key to; None counts from 0.
            squares: float `[2, B, Hkv, N]`, squared gradients of keys and of values, -1 where not known; None
                knows none.

        Raises:
            UserError: a token that would be kept holds NaN or infinity.
        """
        B, _, N, _ = keys.shape
        real = np.arange(N * B) if mask is None else np.flatnonzero(mask.T.reshape(-1).cpu().numpy())
        priorities = self._generator.random_raw(len(real))
        numbers = self.seen + np.arange(len(real))
        places = np.arange(N)[:, None] if positions is None else positions.T.cpu().numpy()
        places = np.broadcast_to(places, (N, B)).reshape(-1)
        self.seen += len(real)
        if len(self) == self.capacity:
            promising = priorities < self._priorities.max()
            real, priorities, numbers = real[promising], priorities[promising], numbers[promising]
        if not len(real):
            return

        old = len(self)
        priorities = np.concatenate([self._priorities, priorities])
        kept = np.arange(len(priorities))
        if len(kept) > self.capacity:
            kept = np.argpartition(priorities, self.capacity - 1)[: self.capacity]
        stays = np.zeros(len(priorities), dtype=bool)
        stays[kept] = True
        entering = np.flatnonzero(stays[old:])
        slots = np.concatenate([np.flatnonzero(~stays[:old]), np.arange(old, len(kept))])
        self._write(slots, keys, values, real[entering], squares)
        self._priorities = _put(priorities[:old], slots, priorities[old:][entering])
        self._numbers = _put(self._numbers, slots, numbers[entering])
        self._positions = _put(self._positions, slots, places[real[entering]])

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared gradients of the sampled keys and values, float32 `[Hkv, n]`, as `contents` orders them.

        -1 where not known.

        Raises:
            UserError: no token was seen yet.
        """
        if self._squares is None:
            raise UserError("the sample is empty: no token was read")
        keys, values = self._squares[:, :, torch.from_numpy(np.argsort(self._numbers))]
        return keys, values

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample as keys and values `[Hkv, n, D]`, in the order in which the tokens were seen.

        Raises:
            UserError: no token was seen yet.
        """
        if self._keys is None or self._values is None:
            raise UserError("the sample is empty: no token was read")
        order = torch.from_numpy(np.argsort(self._numbers))
        return self._keys[:, order], self._values[:, order]

    def positions(self) -> torch.Tensor:
        """The position of each sampled token in its text, int64 `[n]`, as `contents` orders them."""
        return torch.from_numpy(self._positions[np.argsort(self._numbers)])

    def state(self) -> dict[str, torch.Tensor]:
        """All that `restore` needs to go on exactly, as tensors."""
        keys, values = self.contents()
        key_squares, value_squares = self.squares()
        order = np.argsort(self._numbers)
        return {
            "keys": keys,
            "values": values,
            "key_squares": key_squares,
            "value_squares": value_squares,
            "numbers": torch.from_numpy(self._numbers[order]),
            "positions": self.positions(),
            "priorities": torch.from_numpy(self._priorities[order].view(np.int64)),
            "seen": torch.tensor(self.seen),
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to a `state()` of a reservoir of the same capacity, seed and layer."""
        self.seen = int(state["seen"])
        self._numbers = state["numbers"].numpy().copy()
        self._positions = state["positions"].numpy().copy()
        self._priorities = state["priorities"].numpy().view(np.uint64).copy()
        assert len(self) == min(self.seen, self.capacity)
        self._keys = self._values = self._squares = None
        keys, values = state["keys"], state["values"]
        self._allocate(keys, values)
        self._keys[:, : len(self)] = keys  # type: ignore[index]
        self._values[:, : len(self)] = values  # type: ignore[index]
        noted = torch.stack([state["key_squares"], state["value_squares"]])
        self._squares[:, :, : len(self)] = noted  # type: ignore[index]
        self._generator = np.random.Philox(key=self._philox_key)
        self._generator.advance(self.seen // 4)  # one step of Philox makes four outputs
        self._generator.random_raw(self.seen % 4)

    @torch.no_grad()
    def _write(
        self,
        slots: np.ndarray,
        keys: torch.Tensor,
        values: torch.Tensor,
        chosen: np.ndarray,
        squares: torch.Tensor | None,
    ) -> None:
        B = keys.shape[0]
        row = torch.from_numpy(chosen % B).to(keys.device)
        position = torch.from_numpy(chosen // B).to(keys.device)
        new_keys = keys[row, :, position].transpose(0, 1)  # [Hkv, chosen, D]
        new_values = values[row, :, position].transpose(0, 1)
        # Before the copy: a GPU looks through them in microseconds.
        if not (new_keys.isfinite().all() and new_values.isfinite().all()):
            raise UserError(
                f"layer {self._layer}: sampled K or V hold NaN or infinity; accepted are finite numbers, "
                "which another dtype (bfloat16, float32) may give"
            )
        self._allocate(new_keys, new_values)
        at = torch.from_numpy(slots)
        self._keys[:, at] = new_keys.contiguous().cpu()  # type: ignore[index]
        self._values[:, at] = new_values.contiguous().cpu()  # type: ignore[index]
        noted = -1.0 if squares is None else squares[:, row, :, position].permute(1, 2, 0).float().cpu()
        self._squares[:, :, at] = noted  # type: ignore[index]

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keys is None:
            heads, _, head_dim = keys.shape
            self._keys = torch.empty(heads, self.capacity, head_dim, dtype=keys.dtype)
            self._values = torch.empty(heads, self.capacity, values.shape[-1], dtype=values.dtype)
            self._squares = torch.full((2, heads, self.capacity), -1.0)


def _put(array: np.ndarray, slots: np.ndarray, new: np.ndarray) -> np.ndarray:
    """`array` with `new` at `slots`, which may reach beyond its end."""
    grown = np.empty(max(len(array), int(slots.max(initial=-1)) + 1), dtype=array.dtype)
    grown[: len(array)] = array
    grown[slots] = new
    return grown
