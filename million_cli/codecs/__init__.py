"""Alternatives to product quantization, measured in the same way: same tokens, same window, honest bits.

A method is a `Codec` (one file each), registered in `CODECS` under the `quantizer.kind` that chooses it.
"""

from __future__ import annotations

from collections.abc import Callable

from million_cli.codecs.codec import Codec, CodecSpec
from million_cli.codecs.fp8 import Fp8
from million_cli.codecs.simulated import SimulatedCache
from million_cli.codecs.transformers_own import Hqq, Quanto
from million_cli.codecs.uniform import Kivi, PerToken
from million_cli.errors import UserError

CODECS: dict[str, Callable[[CodecSpec], Codec]] = {
    "fp8": Fp8,
    "kivi": Kivi,
    "per-token": PerToken,
    "quanto": Quanto,
    "hqq": Hqq,
}


def make_codec(kind: str, spec: CodecSpec) -> Codec:
    """The codec of a `quantizer.kind`.

    Raises:
        UserError: unknown, not installed, or settings that it does not have.
    """
    if kind not in CODECS:
        raise UserError(f"quantizer.kind={kind}: accepted are {', '.join(CODECS)}")
    return CODECS[kind](spec)


__all__ = ["CODECS", "Codec", "CodecSpec", "SimulatedCache", "make_codec"]
