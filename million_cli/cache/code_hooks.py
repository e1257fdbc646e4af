"""The interface between a store and its codes: each kind of store implements it.

Letters: B batch, Hkv KV heads, n tokens, M subspaces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from million_cli.ops.codes import CodeReader
from million_cli.ops.store_ops import StoreOps
from million_cli.ops.support import Store


class CodeHooks(ABC):
    """The codes of a `CodeStore`, which calls these methods and keeps windows and lengths itself.

    Attributes:
        name: the kind of store.
    """

    name: ClassVar[Store]

    @staticmethod
    @abstractmethod
    def compiled_ops() -> StoreOps:
        """The compiled operations over such a store.  Importing them registers them with torch."""

    @abstractmethod
    def _reserve(self, layer: int, coded: int, like: Tensor) -> None:
        """Make room for `coded` tokens of a layer; `like [B, Hkv, _, D]` gives sizes and device.

        If it fails, the store is unchanged.
        """

    @abstractmethod
    def _is_reserved(self, layer: int, coded: int) -> bool:
        """Whether a layer has room for `coded` tokens, also in the device's tensors."""

    @abstractmethod
    def _write(self, layer: int, start: int, key_codes: Tensor, value_codes: Tensor) -> None:
        """Store codes `[B, Hkv, n, M]` of the tokens start .. start + n - 1, whole pages in reserved room."""

    @abstractmethod
    def _code_tensors(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key codes, value codes and block table of a layer, as in `DeviceLayer`."""

    @abstractmethod
    def _readers(self, layer: int, coded: int) -> tuple[CodeReader, CodeReader]:
        """Readers of the first `coded` tokens of a layer that has been appended to."""

    @abstractmethod
    def _truncate(self) -> None:
        """Free the codes past the lengths, which have shrunk."""

    @abstractmethod
    def _take_codes(self, indices: Tensor) -> None:
        """Reindex the batch of all codes.

        Raises:
            PagePoolExhausted: nothing has changed.
        """

    @abstractmethod
    def _release(self) -> None:
        """Drop the tensors of the codes; no token is left."""

    @abstractmethod
    def _code_bytes(self) -> dict[str, int]:
        """key_codes, value_codes, block_table and pool_reserved of `memory`."""
