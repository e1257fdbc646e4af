"""lm-evaluation-harness: a task of our own, from a folder, answered through the harness with any cache.

Collected only where the extra `lm-eval` is installed (see conftest.py).
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from million_cli.errors import UserError
from million_cli.tasks.lm_eval import Config, load, measure

DEFINITION = """
task: echo
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/echo.jsonl}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: {until}
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PROMPTS = [
    "the quick brown fox jumps over the lazy dog " * 2,
    "one two three four",
    "abcabcabc" * 9,
    "zz " * 20,
]


def greedy(tiny, prompt, tokens=6):
    """The model's answer to a prompt, with a dense cache and without the harness."""
    ids = tiny.tokenizer(prompt, return_tensors="pt").input_ids
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id
    )
    with torch.no_grad():
        output = tiny.model.generate(ids, generation_config=settings)
    return tiny.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A folder with the task `echo`: the expected answers are the dense model's, but for the last one."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    answers = [greedy(tiny, prompt) for prompt in PROMPTS[:-1]] + ["something else"]
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(PROMPTS, answers, strict=True)]
    (tmp_path / "echo.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def define(folder, output_type="generate_until", until="[]"):
    text = DEFINITION.format(folder=folder, output_type=output_type, until=until)
    if output_type != "generate_until":
        text = text[: text.index("generation_kwargs")] + "doc_to_choice: [a, b]\n"
    (folder / "echo.yaml").write_text(text)
    return Config(tasks=["echo"], path=str(folder))


@pytest.mark.parametrize(("max_length", "cut"), [(None, 0), (60, 3), (100, 0)])
def test_prompts_that_lose_their_beginning_are_counted(tiny, folder, max_length, cut):
    config = define(folder)
    config.max_length = max_length
    material = load(config)
    found = measure(tiny.model, tiny.tokenizer, tiny.caches(), material, config, 0).metrics
    assert [len(prompt) for prompt in PROMPTS] == [88, 18, 81, 60]  # a token a character
    assert found["lm_eval_cut"] == cut


def test_the_dense_cache_answers_as_the_model_does_and_codes_are_seen(tiny, folder):
    config = define(folder)
    material = load(config)
    made = []

    def caches(prefill):
        made.append(prefill)
        return tiny.caches()(prefill)

    result = measure(tiny.model, tiny.tokenizer, caches, material, config, 0)
    found = result.metrics
    assert found["lm_eval_echo_exact_match_dense"] == found["lm_eval_average_dense"] == 0.75
    assert found["lm_eval_average"] == found["lm_eval_echo_exact_match"] < 0.75  # random weights: codes tell
    assert made == ["quantized"] * 5  # a batch each, and the memory
    assert found["code_bytes"] > 0
    assert found["cache_tokens"] == len(PROMPTS[0])
    (row,) = result.tables["lm_eval"]
    assert (row["task"], row["metric"], row["filter"], row["samples"]) == ("echo", "exact_match", "none", 4)
    assert row["higher_is_better"] is True
    assert row["dense_se"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)  # of a mean of four
    answers = result.tables["lm_eval_samples"]
    assert [answer["prediction_dense"] == answer["target"] for answer in answers] == [True, True, True, False]
    assert any(answer["prediction"] != answer["prediction_dense"] for answer in answers)


def test_dense_against_dense_is_the_same_in_batches_too(tiny, folder):
    config = define(folder)
    for batch in (1, 3):
        config.batch = batch
        found = measure(tiny.model, tiny.tokenizer, tiny.caches("dense"), load(config), config, 0).metrics
        assert found["lm_eval_average"] == found["lm_eval_average_dense"] == 0.75


def test_stop_sequences_end_an_answer(tiny, folder):
    answer = greedy(tiny, PROMPTS[0])
    config = define(folder, until=json.dumps([answer[2:4]]))
    result = measure(tiny.model, tiny.tokenizer, tiny.caches("dense"), load(config), config, 0)
    assert result.tables["lm_eval_samples"][0]["prediction"] == answer.split(answer[2:4])[0]


def test_a_limit_takes_the_first_documents(tiny, folder):
    config = define(folder)
    config.limit = 3
    result = measure(tiny.model, tiny.tokenizer, tiny.caches("dense"), load(config), config, 0)
    assert result.metrics["lm_eval_average"] == 1
    assert result.tables["lm_eval"][0]["samples"] == 3


def test_the_hash_follows_documents_and_definition(folder):
    config = define(folder)
    first = load(config).sha256
    assert load(config).sha256 == first
    (folder / "echo.yaml").write_text((folder / "echo.yaml").read_text().replace("toks: 6", "toks: 7"))
    assert load(config).sha256 != first
    define(folder)
    (folder / "echo.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert load(config).sha256 != first


def test_what_cannot_be_asked_is_refused_in_one_line(tiny, folder):
    config = define(folder, output_type="multiple_choice")
    with pytest.raises(
        UserError, match=r"echo: it is scored without a cache \(output_type=multiple_choice\)"
    ):
        load(config)
    with pytest.raises(UserError, match=r"task\.tasks=chess: no such task"):
        load(Config(tasks=["chess"], path=str(folder)))
    with pytest.raises(UserError, match=r"task\.path=/nowhere: no such folder"):
        load(Config(tasks=["echo"], path="/nowhere"))
    config = define(folder)
    config.max_length = 6
    with pytest.raises(UserError, match=r"task\.max_length=6: an answer takes up to 6 tokens"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), load(config), config, 0)
    config.max_length, config.chat = None, True
    with pytest.raises(UserError, match=r"task\.chat=true: the model's tokenizer has no chat template"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), load(config), config, 0)
    (folder / "echo.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"task\.tasks=echo: the documents cannot be had: FileNotFoundError"
    ) as error:
        load(config)
    assert "\n" not in str(error.value)
