"""LongBench runs: scores beside the dense cache, resumption, batches, the whole pipeline."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import pytest
import torch
from small_job import SMALL_JOB
from transformers.cache_utils import DynamicCache

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.journal import Journal, Journals
from million_cli.pipelines.evaluate import run_evaluate
from million_cli.pipelines.session import byte_tokenizer
from million_cli.tasks.longbench import data, task
from million_cli.tasks.longbench.data import Sample, Samples
from million_cli.tasks.longbench.datasets import DATASETS
from million_cli.tasks.longbench.task import Config, Question, generate, measure
from million_cli.text import synthetic_text

TEXT = synthetic_text(3, 4000)


def sample(number: int, answer: str, length: int = 100, classes: tuple[str, ...] = ()) -> Sample:
    context = TEXT[50 * number : 50 * number + length]
    return Sample(str(number), f"question {number}", context, [answer], list(classes))


SAMPLES = Samples(
    {
        "qasper": [sample(0, "right", 30), sample(1, "right", 90), sample(2, "wrong", 60)],
        "trec": [sample(3, "right", classes=("right", "wrong"))],
        "samsum": [sample(4, "right"), sample(5, "right")],
    },
    "made here",
    "0" * 64,
)


@pytest.fixture
def by_rule(monkeypatch):
    """Answers "right" with a dense cache, "wrong" with any other; notes the batches."""
    batches = []

    def answer(model, tokenizer, questions, cache):
        kind = "dense" if type(cache) is DynamicCache else "cache"
        batches.append((kind, [q.sample.id for q in questions]))
        return ["right" if kind == "dense" else "wrong" for _ in questions]

    monkeypatch.setattr(task, "generate", answer)
    return batches


def test_scores_are_means_by_dataset_and_category_beside_the_dense_cache(tiny, by_rule):
    config = Config(new_tokens=2, max_length=60, batch=2)
    result = measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, config, 0)
    metrics = result.metrics
    # qasper: one of three answers is "wrong"; dense: the other two
    assert metrics["longbench_qasper"] == pytest.approx(100 / 3)
    assert metrics["longbench_qasper_dense"] == pytest.approx(200 / 3)
    assert (metrics["longbench_trec"], metrics["longbench_trec_dense"]) == (0.0, 100.0)
    assert metrics["longbench_samsum_dense"] == pytest.approx(100, abs=1e-4)  # ROUGE's 1e-8
    assert metrics["longbench_average"] == pytest.approx(100 / 9)
    assert metrics["longbench_average_dense"] == pytest.approx((200 / 3 + 200) / 3, abs=1e-4)
    # categories: QA (qasper) and few-shot (trec, samsum)
    assert metrics["longbench_overall"] == pytest.approx(100 / 6)
    assert metrics["longbench_overall_dense"] == pytest.approx((200 / 3 + 100) / 2, abs=1e-4)
    assert metrics["longbench_n"] == 6
    assert metrics["cache_tokens"] == 60  # the longest prompt
    assert metrics["bits_nominal"] == 2.0  # 8 codes of 4 bits for 16 dimensions
    assert [row["task"] for row in result.tables["longbench"]] == ["qasper", "trec", "samsum"]
    assert result.tables["longbench"][0] == {
        "task": "qasper",
        "category": "single-document QA",
        "metric": "qa_f1",
        "samples": 3,
        "score": pytest.approx(100 / 3),
        "dense": pytest.approx(200 / 3),
    }
    rows = result.tables["longbench_samples"]
    assert metrics["longbench_cut"] == 6
    whole = DATASETS["qasper"].prompt.format(
        context=SAMPLES.datasets["qasper"][2].context, input="question 2"
    )
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert rows[2] == {
        "task": "qasper",
        "id": "2",
        "tokens": 60,
        "tokens_cut": len(byte_tokenizer()(whole).input_ids) - 60,
        "score": 100.0,
        "dense": 0.0,
        "prediction": "wrong",
        "prediction_dense": "right",
    }


def test_batches_hold_prompts_of_one_dataset_longest_first(tiny, by_rule):
    long = Config(new_tokens=2, batch=2, chat=False)
    tiny.model.config.max_position_embeddings, before = 4096, tiny.model.config.max_position_embeddings
    try:
        measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, long, 0)
    finally:
        tiny.model.config.max_position_embeddings = before
    expected = [["1", "2"], ["0"], ["3"], ["4", "5"]]
    assert by_rule == [(kind, ids) for ids in expected for kind in ("cache", "dense")]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("prefill", ["quantized", "exact"])
def test_a_model_answers_with_codes(tiny, kind, prefill):
    asked = []
    make = tiny.caches(kind)

    def caches(prefill):
        asked.append(prefill)
        return make(prefill)

    config = Config(new_tokens=4, max_length=120, batch=3, prefill=prefill)
    result = measure(tiny.model, tiny.tokenizer, caches, SAMPLES, config, 0)
    assert set(asked) == {prefill}
    assert result.metrics["code_bytes"] > 0
    rows = result.tables["longbench_samples"]
    assert all(0 <= row["score"] <= 100 for row in rows)
    again = measure(tiny.model, tiny.tokenizer, make, SAMPLES, config, 0)
    assert again == result


def test_the_dense_cache_under_test_scores_as_the_dense_cache(tiny):
    config = Config(new_tokens=4, max_length=120, batch=3)
    result = measure(tiny.model, tiny.tokenizer, tiny.caches("dense"), SAMPLES, config, 0)
    assert all(r["prediction"] == r["prediction_dense"] for r in result.tables["longbench_samples"])


def test_a_batch_is_answered_as_each_alone(tiny):
    def question(text: str, **settings) -> Question:
        ids = tiny.tokenizer.encode(text)
        stops = [tiny.tokenizer.eos_token_id]
        return Question(**{"sample": None, "ids": ids, "new_tokens": 6, "stops": stops, **settings})

    rest = {"min_new_tokens": 0, "key": ""}
    questions = [question(TEXT[:n], **rest) for n in (90, 40, 60)]
    with torch.inference_mode():
        make = tiny.caches("dense")
        together = generate(tiny.model, tiny.tokenizer, questions, make("exact"))
        alone = [generate(tiny.model, tiny.tokenizer, [q], make("exact"))[0] for q in questions]
        assert together == alone
        # Its first token as a stop: nothing follows; and with one token at least, another comes first.
        first = tiny.tokenizer.encode(alone[0])[0]
        stopped = question(TEXT[:90], **{**rest, "stops": [first]})
        assert (
            len(tiny.tokenizer.encode(generate(tiny.model, tiny.tokenizer, [stopped], make("exact"))[0])) == 1
        )
        at_least = question(TEXT[:90], **{**rest, "stops": [first], "min_new_tokens": 1})
        (text,) = generate(tiny.model, tiny.tokenizer, [at_least], make("exact"))
        assert tiny.tokenizer.encode(text)[0] != first


def journals(folder: Path) -> Journals:
    return Journals(Journal(folder / "cache.jsonl"), Journal(folder / "dense.jsonl"))


def test_a_run_that_was_stopped_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    config = Config(new_tokens=3, max_length=100, batch=2)
    whole = measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, config, 0)
    original, calls = task.generate, []

    def stop_at_the_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(task, "generate", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, config, 0, journals(tmp_path))
    kept = journals(tmp_path)
    assert (len(kept.cache), len(kept.dense)) == (
        3,
        2,
    )  # batches of 2, 1: the third call was the cache's second
    resumed = measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, config, 0, kept)
    assert resumed == whole
    # In all: 4 batches a cache, one call that was stopped.
    assert len(calls) == 4 + 4 + 1
    measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, config, 0, journals(tmp_path))
    assert len(calls) == 9


@pytest.mark.parametrize(
    "change", [{"new_tokens": 4}, {"max_length": 80}, {"batch": 1}, {"prefill": "exact"}, {"chat": True}]
)
def test_only_answers_to_the_same_question_are_kept(tiny, tmp_path, by_rule, change):
    same = {"new_tokens": 3, "max_length": 100, "batch": 2, "chat": False}
    measure(tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, Config(**same), 0, journals(tmp_path))
    del by_rule[:]
    measure(
        tiny.model, tiny.tokenizer, tiny.caches(), SAMPLES, Config(**same | change), 0, journals(tmp_path)
    )
    # This tokenizer has no chat template, so that asks the same.
    assert len(by_rule) == (0 if "chat" in change else 12 if "batch" in change else 8)


def test_a_context_that_the_answers_fill_is_refused_before_any_is_asked(tiny, by_rule):
    samples = Samples({"qasper": SAMPLES.datasets["qasper"], "qmsum": [sample(9, "a")]}, "", "")
    with pytest.raises(UserError, match=r"room for -256 prompt tokens; a lower task\.new_tokens leaves more"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), samples, Config(), 0)
    with pytest.raises(UserError, match=r"task\.max_length=300: accepted are 2 to 256"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), samples, Config(max_length=300), 0)
    assert by_rule == []


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, samples in SAMPLES.datasets.items():
            rows = [
                {
                    "_id": s.id,
                    "input": s.input,
                    "context": s.context,
                    "answers": s.answers,
                    "all_classes": s.classes or None,
                }
                for s in samples
            ]
            file.writestr(f"data/{name}.jsonl", "\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def job(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    small = [
        *SMALL_JOB,
        "cache.page_size=16",
        "cache.extended_residual=32",
        "task=longbench",
        f"task.path={archive}",
        "task.tasks=[qasper,trec,samsum]",
        "task.new_tokens=3",
        "task.max_length=150",
        f"out={tmp_path / 'out'}",
    ]
    return lambda *overrides: run_evaluate(compose([*small, *overrides]))[0].metrics


def test_a_job_from_a_zip_is_recorded_and_goes_on_from_earlier_ones(job, monkeypatch):
    original, calls = task.generate, []

    def noted(model, tokenizer, questions, cache):
        calls.append((type(cache).__name__, questions[0].sample.id))
        return original(model, tokenizer, questions, cache)

    monkeypatch.setattr(task, "generate", noted)
    dense = job("cache=dense")
    assert calls == [("DynamicCache", number) for number in "012345"]  # once each: both caches are the same
    assert dense["longbench_average"] == dense["longbench_average_dense"]
    del calls[:]
    few = job("task.samples=1")
    assert calls == [("DynamicPQCache", number) for number in "034"]  # the dense answers are there already
    assert few["longbench_n"] == 3
    del calls[:]
    found = job()
    assert calls == [("DynamicPQCache", number) for number in "125"]
    assert found["longbench_n"] == 6
    assert found["bits_nominal"] == 1.5
    assert found["longbench_average_dense"] == dense["longbench_average"]
    with Path(found["longbench_samples_table"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["id"]) for row in rows] == [
        (name, s.id) for name, samples in SAMPLES.datasets.items() for s in samples
    ]
    del calls[:]
    assert job()["reused_from"]
    assert calls == []
    job("reuse=false", "task.tasks=[trec]")
    assert calls == [("DynamicPQCache", "3"), ("DynamicCache", "3")]


def test_what_is_wrong_with_the_data_shows_before_a_codebook_is_trained(job, monkeypatch):
    monkeypatch.setattr("million_cli.pipelines.caches.train", None)
    with pytest.raises(UserError, match="has no lcc"):
        job("task.tasks=[lcc]")
    with pytest.raises(UserError, match=r"unknown key task\.dataset"):
        job("+task.dataset=qasper")


def test_the_shipped_configuration_is_the_default():
    shipped = compose(["task=longbench"]).task
    assert Config(**shipped) == Config()
    assert data.HUB == ("THUDM/LongBench", "data.zip")
