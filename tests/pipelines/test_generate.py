"""`million generate` makes the tokens of `model.generate` and reports time and memory."""

from __future__ import annotations

import io
import re

import pytest
import torch

from million_cli.errors import UserError
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.generate import Generation, generate, make_engine
from million_cli.pipelines.prompt import encode_prompt, read_prompt
from million_cli.pipelines.session import Session, byte_tokenizer
from million_cli.tasks.answers import stop_tokens


@pytest.mark.parametrize("cache", ["dense", "contiguous", "paged"])
def test_tokens_are_those_of_generate(job, cache):
    session = Session(job(f"cache={cache}", "model.dtype=float64"))
    caches = Caches(session)
    ids = session.tokenizer("It began long before anyone had words for it.", return_tensors="pt")["input_ids"]
    engine = make_engine(session, caches, ids.shape[1] + 60)
    ends = stop_tokens(session.model, session.tokenizer)
    tokens = [token for (token,) in engine.generate(ids, max_new_tokens=60, eos=ends)]
    expected = session.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=caches("exact"),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    assert tokens == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("quantizer", ["pq-4bit", "fp8", "dense"])
def test_speed_and_memory_are_said(job, capsys, quantizer):
    generate(job(f"quantizer={quantizer}", "cache=paged"), "Some words", Generation(tokens=8))
    out, err = capsys.readouterr()
    assert out.startswith("Some words")
    line = err.splitlines()[-1]
    assert re.match(r"8 tokens, the first after \d+ ms, [\d.]+ tokens/s", line), line
    assert ("cache" in line) == (quantizer != "fp8")  # simulated: its bytes mean nothing


TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def instruct_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def instruct(job, tmp_path):
    """A job on an instruct model in a folder: a chat template, and generation settings of its own."""
    model = Session(job()).model
    model.generation_config.update(repetition_penalty=1.3, no_repeat_ngram_size=2, eos_token_id=257)
    model.save_pretrained(tmp_path / "model")
    instruct_tokenizer().save_pretrained(tmp_path / "model")
    return job("model=folder", f"model.path={tmp_path}/model", "cache=dense")


@pytest.mark.parametrize(
    ("prompt", "chat", "applied"),
    [
        ("Who wrote Faust?", None, True),
        ("Who wrote Faust?\n\nAnd when?", None, True),
        ("Who wrote Faust?", False, False),
        ("<|user|>Who?<|end|><|assistant|>", None, False),
        ("<|user|>Who?<|end|><|assistant|>", True, True),
    ],
)
def test_the_template_is_applied_to_plain_text(prompt, chat, applied):
    tokenizer = instruct_tokenizer()
    ids, found = encode_prompt(tokenizer, prompt, chat)
    text = f"<|user|>{prompt}<|end|><|assistant|>" if applied else prompt
    assert found == applied
    assert ids.tolist() == [tokenizer(text, add_special_tokens=False).input_ids]


def test_the_mark_that_ends_a_turn_shows_a_prompt_in_the_template():
    tokenizer = instruct_tokenizer("[INST] {{ messages[0].content }} [/INST]")
    assert not encode_prompt(tokenizer, "[INST] Who wrote Faust? [/INST]", None)[1]
    assert encode_prompt(tokenizer, "Who wrote Faust?", None)[1]


def test_without_a_template_the_prompt_is_continued_and_chat_is_refused():
    ids, applied = encode_prompt(byte_tokenizer(), "ab", None)
    assert (ids.tolist(), applied) == ([byte_tokenizer()("ab").input_ids], False)
    with pytest.raises(UserError, match="--chat: the tokenizer has no chat template; accepted is --no-chat"):
        encode_prompt(byte_tokenizer(), "ab", True)


def test_a_template_that_fails_is_one_line():
    with pytest.raises(UserError, match="chat template fails: no users here; accepted is --no-chat"):
        encode_prompt(instruct_tokenizer("{{ raise_exception('no users here') }}"), "ab", None)


def test_what_decides_the_answer_is_said(instruct, capsys):
    generate(instruct, "Who wrote Faust?", Generation(tokens=4))
    out, err = capsys.readouterr()
    assert "Faust" not in out  # an answer alone
    assert err.splitlines()[:3] == [
        "decoding: greedy",
        "prompt: in the tokenizer's chat template (--no-chat continues it as it is)",
        "not applied from the model's generation configuration: "
        "no_repeat_ngram_size=2, repetition_penalty=1.3",
    ]
    generate(instruct, "Who wrote Faust?", Generation(tokens=4, chat=False, temperature=0.7, top_p=0.9))
    out, err = capsys.readouterr()
    assert out.startswith("Who wrote Faust?")
    assert err.splitlines()[0] == "decoding: temperature 0.7, top-p 0.9, seed 0"


def test_a_seed_draws_the_same_tokens_again(instruct, capsys):
    def text(seed):
        generate(instruct, "Who wrote Faust?", Generation(tokens=24, temperature=1.0, seed=seed))
        return capsys.readouterr().out

    assert text(1) == text(1) != text(2)


def test_top_p_without_a_temperature_is_refused():
    with pytest.raises(UserError, match=r"top_p=0\.9: accepted with a temperature above 0"):
        Generation(top_p=0.9)


def test_a_prompt_comes_from_the_argument_a_file_or_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("from standard input\n"))
    assert read_prompt("as it is\n", None) == "as it is\n"
    assert read_prompt(None, str(file)) == "from a file\n"
    assert read_prompt("-", None) == "from standard input"


def test_prompts_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    for argument, file in ((None, None), ("a", "b")):
        with pytest.raises(UserError, match=r"either a prompt .* or --prompt-file"):
            read_prompt(argument, file)
    with pytest.raises(UserError, match="no such text file"):
        read_prompt(None, str(tmp_path / "none"))
    with pytest.raises(UserError, match="the prompt is not UTF-8"):
        read_prompt("\udcff", None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(UserError, match="the prompt is not UTF-8"):
        read_prompt("-", None)
