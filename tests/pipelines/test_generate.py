"""`million generate` makes the tokens of `model.generate` and says what it took."""

from __future__ import annotations

import re

import pytest
import torch

from million_cli.pipelines.caches import Caches
from million_cli.pipelines.generate import ends_of, generate, make_engine
from million_cli.pipelines.session import Session


@pytest.mark.parametrize("cache", ["dense", "contiguous", "paged"])
def test_tokens_are_those_of_generate(job, cache):
    session = Session(job(f"cache={cache}", "model.dtype=float64"))
    caches = Caches(session)
    ids = session.tokenizer("It began long before anyone had words for it.", return_tensors="pt")["input_ids"]
    engine = make_engine(session, caches, ids.shape[1] + 60)
    tokens = [token for (token,) in engine.generate(ids, max_new_tokens=60, eos=ends_of(session))]
    expected = session.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=caches("exact"),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=ends_of(session),
        pad_token_id=0,
    )
    assert tokens == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("quantizer", ["pq-4bit", "fp8", "dense"])
def test_speed_and_memory_are_said(job, capsys, quantizer):
    generate(job(f"quantizer={quantizer}", "cache=paged"), "Some words", 8)
    out, err = capsys.readouterr()
    assert out.startswith("Some words")
    line = err.splitlines()[-1]
    assert re.match(r"8 tokens, the first after \d+ ms, [\d.]+ tokens/s", line), line
    assert ("cache" in line) == (quantizer != "fp8")  # simulated: its bytes mean nothing
