"""Which windows of a text a model is calibrated on, and which a budget of bits is measured on."""

from __future__ import annotations

import pytest
import torch

from million_cli.calibration.windows import calibration_windows, measuring_windows
from million_cli.recipe import Sampling
from million_cli.text import Text, synthetic_text

TEXT = Text(synthetic_text(1, 9000), "synthetic")


def sampling(**changes):
    return Sampling(**{"context": 32, "long": 128, "long_share": 0.3, "repeats": 0.1, "code": 0.2, **changes})


def test_long_windows_are_mixed_in_as_far_as_the_text_fills_them(tiny):
    windows = calibration_windows(tiny.model, tiny.tokenizer, TEXT, sampling(tokens=2048), 0)
    lengths = [len(window) for window in windows]
    assert lengths.count(128) == round(0.3 * 2048 / 128)
    assert set(lengths) == {32, 128}
    assert lengths[0] == 32  # spread among the others
    ids = tiny.tokenizer(TEXT.content)["input_ids"]
    first = next(window for window in windows if len(window) == 128)
    assert first.tolist() == ids[:128]
    short = calibration_windows(tiny.model, tiny.tokenizer, TEXT, sampling(tokens=100), 0)
    assert {len(window) for window in short} == {32}
    none = calibration_windows(tiny.model, tiny.tokenizer, TEXT, sampling(tokens=2048, long_share=0), 0)
    assert {len(window) for window in none} == {32}


def test_no_window_is_longer_than_the_model(tiny):
    windows = calibration_windows(tiny.model, tiny.tokenizer, TEXT, sampling(tokens=4000, long=8192), 0)
    assert max(len(window) for window in windows) == tiny.model.config.max_position_embeddings


@pytest.mark.parametrize("tokens", [64, 1024])
def test_half_of_what_is_measured_fetches_from_far_away(tiny, tokens):
    windows = measuring_windows(tiny.model, tiny.tokenizer, TEXT, sampling(tokens=4000), 0, tokens)
    usual = [window for window in windows if len(window) == 32]
    far = [window for window in windows if len(window) == 128]
    assert len(usual) == max(1, tokens // 2 // 32)
    assert len(far) == max(1, tokens // 2 // 128)
    for window in far:
        half = window[:64].tolist()
        end, at = window[96:].tolist(), 0
        while at < 32:  # whole passages of the first half follow each other
            longest = max(
                n
                for n in range(1, 33 - at)
                if any(half[s : s + n] == end[at : at + n] for s in range(65 - n))
            )
            assert longest >= min(16, 32 - at)
            at += longest


def test_the_same_seed_measures_the_same(tiny):
    one, two = (
        measuring_windows(tiny.model, tiny.tokenizer, TEXT, sampling(tokens=4000), 3, 512) for _ in range(2)
    )
    assert all(map(torch.equal, one, two))
