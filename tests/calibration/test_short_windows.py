"""Codebooks calibrated on short windows serve long texts nearly as those calibrated on long windows do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import million_cli
from million_cli.hf.cache import DynamicPQCache
from million_cli.hf.models import load_model
from million_cli.recipe import Recipe
from million_cli.tasks.perplexity import Comparison

SHORT, LONG = 512, 2048
TEXTS = Path(million_cli.__file__).parent / "assets" / "text"
PLAIN = (  # euclidean, one width: seconds on one core
    "quantizer.bits=null",
    "quantizer.weighting=none",
    *(
        f"quantizer.{side}.{what}"
        for side in ("keys", "values")
        for what in ("metric=euclidean", "rotation=none")
    ),
    "quantizer.keys.nbits=6",
    "quantizer.values.nbits=6",
    "sample.information=0",
    "sample.tokens=16384",
    "sample.reservoir=4096",
    "sample.code=0",
    "sample.long_share=0",
    "sample.repeats=0",
    "train.iterations=5",
)


def test_short_windows_are_near_long_ones_on_long_text() -> None:
    """KL on a text of four short windows, in the part beyond the first; as keys lie, it is far larger."""
    model, tokenizer = load_model("reference", "float32")
    judged = (TEXTS / "wikitext2-test-excerpt.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(tokenizer(judged)["input_ids"][:LONG])[None]
    with torch.inference_mode():
        dense = model(ids[:, :-1]).logits

    def kl(context: int, how: str, positions: int | None) -> float:
        codebook = trained(model, tokenizer, context, how)
        assert codebook.meta.positions == positions
        text = DynamicPQCache(model, codebook, prefill="quantized")
        with torch.inference_mode():
            logits = model(ids[:, :-1], past_key_values=text).logits
        comparison = Comparison()
        comparison.add(dense[:, SHORT:], logits[:, SHORT:], ids[:, SHORT + 1 :])
        return float(comparison.metrics()["kl_e3"] or 0.0)

    short, long = (kl(context, "positions=2048", LONG) for context in (SHORT, LONG))
    assert short < 1.1 * long  # 1.05 when this was written
    assert kl(SHORT, "positions=0", SHORT) > 1.5 * long


def trained(model: Any, tokenizer: Any, context: int, how: str) -> million_cli.Codebook:
    text = (TEXTS / "wikitext2-valid-excerpt.txt").read_text(encoding="utf-8")[:120_000]
    recipe = Recipe.named("pq-4bit", *PLAIN, f"quantizer.{how}", f"sample.context={context}")
    return million_cli.train_codebook(model, tokenizer, text, recipe, show_progress=False)
