"""KV-cache product quantization for transformers models."""
