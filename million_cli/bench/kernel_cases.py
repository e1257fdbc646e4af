"""`million bench kernel`: the shapes that are measured, and the settings that choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from million_cli.errors import UserError


@dataclass(frozen=True)
class Case:
    """One decode shape; `m_keys` and `m_values` are subspaces (D: 8 bits, D / 2: 4, D / 4: 2, D / 8: 1)."""

    batch: int
    q_heads: int
    kv_heads: int
    context: int
    m_keys: int = 64
    m_values: int = 64
    head_dim: int = 128
    dtype: str = "float16"


CASES = (
    Case(1, 32, 32, 4096),
    Case(1, 32, 32, 32768),
    Case(1, 32, 32, 131072),
    Case(4, 32, 32, 32768),
    Case(1, 32, 8, 32768),
    Case(1, 32, 8, 131072),
    Case(8, 32, 8, 32768),
    Case(1, 64, 8, 131072),
    Case(1, 32, 32, 131072, m_keys=32, m_values=32),
    Case(8, 32, 8, 32768, m_keys=64, m_values=32),
    Case(4, 32, 8, 32768, dtype="bfloat16"),
    Case(1, 32, 32, 131072, m_keys=16, m_values=16),
    Case(1, 32, 32, 131072, m_keys=128, m_values=128),
    Case(8, 32, 8, 32768, m_keys=128, m_values=64),
    Case(8, 32, 8, 32768, m_keys=32, m_values=16),
)
"""The shapes whose figures are tracked; dense attention of the same shape is measured beside each."""

LOOKUP_CASES = (CASES[1], CASES[4])
"""Cases that the contiguous lookup-table kernel is measured on too, in both layouts of the values."""


@dataclass(frozen=True)
class EncodeCase:
    """A prompt of one layer, `kv_heads` and `m` for keys and for values alike."""

    context: int
    m: int
    dtype: str = "float16"
    kv_heads: int = 32
    head_dim: int = 128


ENCODE_CASES = (
    EncodeCase(32768, 64),
    EncodeCase(32768, 64, "bfloat16"),
    EncodeCase(32768, 32),
    EncodeCase(32768, 32, "bfloat16"),
    EncodeCase(32768, 128),
    EncodeCase(32768, 16),
)
"""Prompts whose encoding is timed, keys and values together, with a rotation a head and without."""


@dataclass
class Config:
    """Which of CASES and ENCODE_CASES are measured; an empty list selects all.

    Attributes:
        dtype: of queries, windows and prompts.
        batch, context: sequences at once and tokens of each (of decode cases).
        heads: query and KV heads, e.g. `32/8` (of decode cases).
        decode: measure decode attention.
        encode: measure encoding.
        replays: replays of each CUDA graph; the figure is their median time.
    """

    name: str = "kernel"
    dtype: list[str] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    decode: bool = True
    encode: bool = True
    replays: int = 30

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise UserError(f"bench.replays={self.replays}: accepted are integers from 1")
        for name, of in _FILTERS.items():
            accepted = list(dict.fromkeys(of(case) for case in CASES))
            for value in getattr(self, name):
                if value not in accepted:
                    raise UserError(
                        f"bench.{name}={value}: accepted are some of {', '.join(map(str, accepted))}"
                    )
        if not self.decode_cases() and not self.encode_cases():
            raise UserError("bench: no case has all that is asked for; accepted are fewer conditions")

    def decode_cases(self) -> tuple[Case, ...]:
        """Those of CASES that are asked for."""
        return tuple(
            case
            for case in CASES
            if self.decode
            and all(of(case) in (getattr(self, name) or [of(case)]) for name, of in _FILTERS.items())
        )

    def encode_cases(self) -> tuple[EncodeCase, ...]:
        """Those of ENCODE_CASES that are asked for."""
        return tuple(
            case for case in ENCODE_CASES if self.encode and case.dtype in (self.dtype or [case.dtype])
        )


_FILTERS: dict[str, Callable[[Case], Any]] = {
    "dtype": lambda case: case.dtype,
    "batch": lambda case: case.batch,
    "context": lambda case: case.context,
    "heads": lambda case: f"{case.q_heads}/{case.kv_heads}",
}
