"""Recall: the bookkeeping with a model that answers by rule, decoding with a real one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from million_cli.errors import UserError
from million_cli.tasks import passkey
from million_cli.tasks.passkey import Config, completions, measure
from million_cli.tasks.recall_text import FACT
from million_cli.text import Text, synthetic_text


class RuleModel(torch.nn.Module):
    """Finds the fact in its prompt and answers it, except when a test cache has it in its first half."""

    device = torch.device("cpu")
    config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=1024)
    generation_config = None

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.batches = []

    def set_attn_implementation(self, name):
        """It has no attention to replace."""

    def get_output_embeddings(self):
        """It has none."""

    def generate(self, input_ids, attention_mask, past_key_values, generation_config):
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        before, after = FACT.split("{name}")[0], FACT.split("{name}")[1].split("{word}")[0]
        answers = []
        for text in texts:
            name = text.rsplit(before.strip().removeprefix("The "), 1)[1].split()[0].rstrip("?")
            at = text.index(f"{before}{name}{after}".strip())
            word = text[at:].split(after)[1].split(".")[0]
            forgets = not isinstance(past_key_values, DynamicCache) and at < len(text) / 2
            answers.append(" nothing" if forgets else f" {word}.")
        self.batches.append((type(past_key_values), len(texts), attention_mask[:, -1].tolist()))
        new = self.tokenizer(answers, return_tensors="pt", padding=True, padding_side="right").input_ids
        output = torch.cat([input_ids, new], dim=1)
        keys = torch.zeros(len(texts), 1, output.shape[1] - 1, 4)  # the newest token is not read
        past_key_values.update(keys, keys, 0)
        return output


class OtherCache(DynamicCache.__mro__[1]):
    """Any cache that is not the dense one."""

    def __init__(self):
        super().__init__(layers=DynamicCache(config=RuleModel.config).layers)


@pytest.fixture
def rule(tiny):
    return RuleModel(tiny.tokenizer)


def test_recall_is_counted_by_cell_beside_the_dense_cache(rule, tiny):
    config = Config(lengths=[300, 600], depths=[0.0, 1.0], samples=3, batch=4, facts=2)
    text = Text(synthetic_text(0, 4000), "synthetic")
    result = measure(rule, tiny.tokenizer, lambda prefill: OtherCache(), text, config, 0)
    assert result.metrics["recall"] == 0.5
    assert result.metrics["recall_dense"] == 1.0
    assert result.metrics["recall_n"] == 12
    assert (result.metrics["recall_lost"], result.metrics["recall_gained"]) == (6, 0)
    # Wilson's interval of 6 in 12, and of none and all of 3, worked out by hand with z = 1.959964.
    assert result.metrics["recall_low"] == pytest.approx(0.253782, abs=1e-6)
    assert result.metrics["recall_high"] == pytest.approx(0.746218, abs=1e-6)
    interval = {0.0: (0.0, 0.561497), 1.0: (0.438503, 1.0)}
    expected = [
        {
            "length": length,
            "depth": depth,
            "facts": 2,
            "recall": depth,
            "recall_low": pytest.approx(interval[depth][0], abs=1e-6),
            "recall_high": pytest.approx(interval[depth][1], abs=1e-6),
            "recall_dense": 1.0,
            "recall_n": 3,
        }
        for length in (300, 600)
        for depth in (0.0, 1.0)
    ]
    assert result.tables["passkey"] == expected
    # Both caches saw every batch, and the padding was on the left.
    assert [size for _, size, _ in rule.batches] == [4] * 6
    assert all(last == [1] * 4 for _, _, last in rule.batches)


def test_the_default_grid_can_tell_one_question_in_a_hundred(tiny):
    config = Config()
    assert len(passkey.default_lengths(tiny.model, 4)) * len(config.depths) * config.samples >= 300


def test_the_same_seed_asks_the_same_questions(rule, tiny):
    asked = []
    tokenizer = tiny.tokenizer
    config = Config(lengths=[300], depths=[0.5], samples=2)
    for seed in (1, 1, 2):
        prompts = []
        original = passkey.completions

        def spy(model, tok, texts, cache, n, prompts=prompts, original=original):
            prompts += texts
            return original(model, tok, texts, cache, n)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passkey, "completions", spy)
            measure(
                rule,
                tokenizer,
                lambda prefill: OtherCache(),
                Text(synthetic_text(0, 4000), "s"),
                config,
                seed,
            )
        asked.append(prompts)
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("kind", ["dense", "contiguous", "paged"])
def test_a_left_padded_batch_is_continued_as_each_prompt_alone(tiny, text, kind):
    prompts = [text.content[start : start + length] for start, length in ((0, 120), (50, 90), (200, 40))]
    make = tiny.caches(kind)
    together = completions(tiny.model, tiny.tokenizer, prompts, make("exact"), 6)
    alone = [completions(tiny.model, tiny.tokenizer, [p], make("exact"), 6)[0] for p in prompts[:1]]
    assert together[:1] == alone
    if kind == "dense":  # with codes, padding shifts which tokens are coded
        assert together == [
            completions(tiny.model, tiny.tokenizer, [p], make("exact"), 6)[0] for p in prompts
        ]


def test_quantized_prefill_is_what_the_question_sees(tiny):
    seen = []
    make = tiny.caches()

    def caches(prefill):
        seen.append(prefill)
        return make(prefill)

    text = Text(synthetic_text(0, 4000), "synthetic")
    config = Config(lengths=[200], depths=[0.5], samples=1, new_tokens=2)
    result = measure(tiny.model, tiny.tokenizer, caches, text, config, 0)
    assert seen == ["quantized"]
    assert result.metrics["code_bytes"] > 0
    assert 0 <= result.metrics["recall"] <= 1


def test_lengths_default_to_shares_of_the_context(tiny):
    assert passkey.default_lengths(tiny.model, 4) == [63, 126, 252]
    long = SimpleNamespace(config=LlamaConfig(max_position_embeddings=8192))
    assert passkey.default_lengths(long, 4) == [256, 512, 1024]


def test_a_prompt_longer_than_the_context_is_refused(tiny, text):
    config = Config(lengths=[254])
    with pytest.raises(UserError, match=r"lengths\+new_tokens=258: accepted are 2 to 256"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), text, config, 0)


@pytest.mark.parametrize(
    "settings",
    [{"samples": 0}, {"batch": 0}, {"new_tokens": 0}, {"prefill": "none"}, {"depths": []}, {"lengths": []}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Config(**settings)
