"""Product quantization: codebooks, their training, vectors to codes and back."""

from million_cli.pq.codebook import Codebook, CodebookMeta, LayerPQ, ProductQuantizer
from million_cli.pq.codec import decode, encode
from million_cli.pq.packing import code_dtype, pack_bits, packed_bytes, unpack_bits
from million_cli.pq.setup import Setup
from million_cli.pq.train import train_codebook, train_quantizer
from million_cli.pq.transform import Transform

__all__ = [
    "Codebook",
    "CodebookMeta",
    "LayerPQ",
    "ProductQuantizer",
    "Setup",
    "Transform",
    "code_dtype",
    "decode",
    "encode",
    "pack_bits",
    "packed_bytes",
    "train_codebook",
    "train_quantizer",
    "unpack_bits",
]
