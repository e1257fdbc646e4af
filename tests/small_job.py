"""Overrides of a job that samples and trains within a second: random weights and text, 8 centroids."""

SMALL_JOB = [
    "model=tiny-random",
    "data=synthetic",
    "data.max_chars=3000",
    "sample.tokens=2048",
    "sample.context=256",
    "sample.reservoir=512",
    "train.iterations=2",
    "quantizer.bits=null",
    "quantizer.keys.nbits=3",
    "quantizer.values.nbits=3",
]
