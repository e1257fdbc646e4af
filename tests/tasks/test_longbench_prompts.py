"""LongBench's prompts as published, and how they become token ids."""

from __future__ import annotations

import hashlib
import json
from string import Formatter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from million_cli.errors import UserError
from million_cli.pipelines.session import byte_tokenizer
from million_cli.tasks.longbench.data import Sample
from million_cli.tasks.longbench.datasets import DATASETS
from million_cli.tasks.longbench.prompting import encode, fit, truncate_middle
from million_cli.tasks.longbench.prompts import PROMPTS
from million_cli.tasks.longbench.task import Config, ask

BYTES = byte_tokenizer()
FEW_SHOT = {"trec", "triviaqa", "samsum", "lsht"}
CODE = {"lcc", "repobench-p"}
WITHOUT_INPUT = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}


@pytest.fixture
def starting():
    """A tokenizer that puts a special token (258) in front, and has a chat template that writes it itself."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}U:{{ messages[0]['content'] }}{% if add_generation_prompt %}|A:{% endif %}"
    )
    return tokenizer


def test_the_prompts_are_the_published_file():
    """Written as that file is, they have its digest (version of 2024 with 21 datasets, 4977 characters)."""
    text = json.dumps(PROMPTS, ensure_ascii=False, indent=4)
    assert len(text) == 4977
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"
    )


def test_there_are_21_datasets_as_published():
    assert len(DATASETS) == 21
    assert list(DATASETS) == list(PROMPTS)
    assert {name for name, d in DATASETS.items() if not d.chat} == FEW_SHOT | CODE
    assert {name for name, d in DATASETS.items() if d.first_line} == FEW_SHOT
    assert {name for name, d in DATASETS.items() if d.stop_at_newline} == {"samsum"}
    lengths = {n: {name for name, d in DATASETS.items() if d.new_tokens == n} for n in (32, 64, 128, 512)}
    assert sum(map(len, lengths.values())) == 21
    assert lengths[512] == {"gov_report", "qmsum", "multi_news", "vcsum"}
    assert lengths[128] == {"narrativeqa", "qasper", "dureader", "samsum"}
    assert lengths[64] == {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht"} | CODE
    metrics = {d.metric.__name__: 0 for d in DATASETS.values()}
    for dataset in DATASETS.values():
        metrics[dataset.metric.__name__] += 1
    assert metrics == {
        "qa_f1": 7,
        "qa_f1_zh": 1,
        "rouge": 4,
        "rouge_zh": 2,
        "classification": 2,
        "count": 1,
        "retrieval": 1,
        "retrieval_zh": 1,
        "code_similarity": 2,
    }


@pytest.mark.parametrize("name", DATASETS)
def test_a_prompt_holds_the_sample(name, tiny):
    fields = [field for _, field, _, _ in Formatter().parse(PROMPTS[name]) if field is not None]
    assert fields == (["context"] if name in WITHOUT_INPUT else ["context", "input"])
    sample = Sample("1", input="{what}?", context="{long} text", answers=["a"], classes=["a"])
    tiny.model.config.max_position_embeddings, before = 4096, tiny.model.config.max_position_embeddings
    try:
        question = ask(tiny.model, BYTES, name, sample, Config(new_tokens=40))
    finally:
        tiny.model.config.max_position_embeddings = before
    text = BYTES.decode(question.ids)
    head, _, tail = PROMPTS[name].partition("{context}")
    assert text == head + "{long} text" + tail.replace("{input}", "{what}?")
    assert question.new_tokens == min(40, DATASETS[name].new_tokens)
    newline = BYTES.encode("\n")[-1]
    assert (newline in question.stops) is (name == "samsum") is bool(question.min_new_tokens)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(20, "aaaaaaaaaabbbbbbbbbb"), (19, "aaaaaaaaabbbbbbbbb"), (7, "aaabbb"), (6, "aaabbb"), (2, "ab")],
)
def test_the_middle_is_cut_by_tokens_half_from_each_end(limit, expected):
    assert truncate_middle(BYTES, "a" * 10 + "b" * 10, limit) == expected


def test_special_tokens_count_but_are_not_kept_as_text(starting):
    # 1 + 8 tokens are more than 8: 4 from the front, one of them special, and 4 from the end
    assert truncate_middle(starting, "abcdefgh", 8) == "abcefgh"
    assert encode(starting, "abcefgh", chat=False) == [starting.bos_token_id, *BYTES.encode("abcefgh")]


def test_a_chat_prompt_has_one_special_token_in_front(starting):
    ids = encode(starting, "hello", chat=True)
    assert ids.count(starting.bos_token_id) == 1
    assert starting.decode(ids) == "<|start|>U:hello|A:"


def test_the_chat_template_is_used_where_published(starting, tiny):
    sample = Sample("1", "input", "context", ["a"], ["a"])
    config = Config(new_tokens=1, max_length=100)
    for name, dataset in DATASETS.items():
        ids = ask(tiny.model, starting, name, sample, config).ids
        assert starting.decode(ids).startswith("<|start|>U:") is dataset.chat
    plain = ask(tiny.model, starting, "qasper", sample, Config(new_tokens=1, chat=False)).ids
    assert "U:" not in starting.decode(plain)[:12]


def test_the_limit_counts_the_prompt_and_the_room_counts_all(starting):
    prompt = "x" * 100
    # limit 20: 9 characters and the special token, and 10 from the end; the template adds U:, |A: and its own
    assert len(fit(starting, prompt, chat=True, room=60, limit=20)) == 19 + 6
    # 101 tokens are too many for 60, and so are 59 characters with 6; 53 are not
    assert len(fit(starting, prompt, chat=True, room=60)) == 53 + 6
    assert len(fit(starting, prompt, chat=True, room=106)) == 100 + 6
    assert fit(starting, prompt, chat=False, room=60, limit=1000) == fit(
        starting, prompt, chat=False, room=60
    )


@given(st.text(max_size=60), st.integers(8, 80), st.none() | st.integers(2, 80))
def test_a_prompt_fits_and_is_whole_if_it_can_be(text, room, limit):
    """Halves may end within a character, whose replacement is longer."""
    whole = BYTES.encode(text)
    ids = fit(BYTES, text, chat=False, room=room, limit=limit)
    assert len(ids) <= room
    if len(whole) <= min(room, limit or room):
        assert ids == whole


def test_no_room_is_refused():
    with pytest.raises(UserError, match=r"room for 1 prompt tokens; a lower task\.new_tokens"):
        fit(BYTES, "abc", chat=False, room=1)
