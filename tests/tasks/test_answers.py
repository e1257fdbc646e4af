"""Greedy answers: nothing of the model's own generation configuration gets in; they end at a stop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import GenerationConfig

from million_cli.errors import UserError
from million_cli.tasks.answers import greedy, plain_generation, stop_tokens
from million_cli.tasks.passkey import completions

PROMPTS = [[7, 8, 9, 7, 8, 9, 7, 8], [5, 5, 5, 5], [100]]
OWN = {  # each changes a greedy answer if it gets in
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "suppress_tokens": list(range(200)),
    "begin_suppress_tokens": list(range(200)),
    "bad_words_ids": [[token] for token in range(200)],
    "min_length": 40,
    "num_beams": 3,
    "do_sample": True,
    "forced_eos_token_id": 3,
    "sequence_bias": [[[token], -100.0] for token in range(200)],
    "renormalize_logits": True,
    "max_time": 0.0,
    "penalty_alpha": 0.6,
}


def by_argmax(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture
def own(tiny):
    """The model with a generation configuration of its own."""
    before = tiny.model.generation_config

    def put(**settings):
        tiny.model.generation_config = GenerationConfig(**settings)

    yield put
    tiny.model.generation_config = before


def test_an_answer_is_the_argmax_of_each_step(tiny):
    found = greedy(tiny.model, tiny.tokenizer, PROMPTS, tiny.caches("dense")("exact"), new_tokens=6, stops=[])
    assert found == [by_argmax(tiny.model, ids, 6) for ids in PROMPTS]


def test_a_prompt_that_does_not_fit_beside_its_answer_is_refused(tiny):
    room = tiny.model.config.max_position_embeddings
    ask = partial(greedy, tiny.model, tiny.tokenizer, [[5] * (room - 6)], stops=[])
    assert len(ask(tiny.caches("dense")("exact"), new_tokens=6)[0]) == 6
    with pytest.raises(
        UserError, match=f"a prompt of {room - 6} tokens and 7 new ones: the model takes {room}"
    ):
        ask(tiny.caches("dense")("exact"), new_tokens=7)


@pytest.mark.parametrize("name", OWN)
def test_nothing_of_the_models_own_settings_gets_in(tiny, own, name):
    def answers():
        return greedy(
            tiny.model, tiny.tokenizer, PROMPTS, tiny.caches("dense")("exact"), new_tokens=6, stops=[]
        )

    own()
    expected = answers()
    own(**{name: OWN[name]})
    kept = tiny.model.generation_config
    assert answers() == expected
    assert tiny.model.generation_config is kept


def test_recall_asks_through_it(tiny, own, text):
    prompts = [text.content[:50]]
    expected = completions(tiny.model, tiny.tokenizer, prompts, tiny.caches("dense")("exact"), 6)
    own(no_repeat_ngram_size=1, suppress_tokens=list(range(200)))
    assert completions(tiny.model, tiny.tokenizer, prompts, tiny.caches("dense")("exact"), 6) == expected


def test_an_answer_ends_with_its_first_stop(tiny):
    (long,) = greedy(
        tiny.model, tiny.tokenizer, PROMPTS[:1], tiny.caches("dense")("exact"), new_tokens=8, stops=[]
    )
    stop = long[3]
    (short,) = greedy(
        tiny.model, tiny.tokenizer, PROMPTS[:1], tiny.caches("dense")("exact"), new_tokens=8, stops=[stop]
    )
    assert short == long[: long.index(stop) + 1]


def test_stops_are_the_tokenizers_and_the_models(tiny, own):
    own(eos_token_id=[3, 4])
    assert stop_tokens(tiny.model, tiny.tokenizer) == [tiny.tokenizer.eos_token_id, 3, 4]


def test_the_own_configuration_comes_back_after_an_error(tiny, own):
    own(num_beams=3)
    kept = tiny.model.generation_config
    with pytest.raises(KeyError), plain_generation(tiny.model, []):
        raise KeyError
    assert tiny.model.generation_config is kept
