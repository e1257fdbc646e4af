"""Alternatives to product quantization, measured alike: same tokens, same window, all stored bits counted.

A codec is a class in a file of its own (see `codec.Codec`) with a line in `registry.CODECS`, or an entry
point `million.codecs` of another package.
"""

from __future__ import annotations

from million_cli.codecs.codec import Calibrated, Codec, Groups, NoSettings, Shape
from million_cli.codecs.simulated import SimulatedCache

__all__ = ["Calibrated", "Codec", "Groups", "NoSettings", "Shape", "SimulatedCache"]
