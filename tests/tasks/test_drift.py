"""Drift: forced reading against token by token, free answers against their definitions, resumption."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_job import SMALL_JOB

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.journal import Journal, Journals
from million_cli.pipelines.evaluate import run_evaluate
from million_cli.report import sources
from million_cli.report.positions import exhibits
from million_cli.tasks import drift
from million_cli.tasks.answers import greedy
from million_cli.tasks.drift import Answers, Config, Forced, cut_prompts, measure, read_answers, repetition
from million_cli.tasks.perplexity import find_head

SMALL = {"prompts": 5, "prompt_tokens": 60, "new_tokens": 48, "batch": 2, "buckets": 4, "ngram": 2}


def test_the_dense_cache_does_not_drift_from_itself(tiny, text):
    found = measure(tiny.model, tiny.tokenizer, tiny.caches("dense"), text, Config(**SMALL), 0).metrics
    assert found["drift_kl_e3"] == 0
    assert found["drift_top1_agreement"] == found["drift_same"] == 1
    assert found["drift_length"] == found["drift_length_dense"]
    assert found["drift_repetition"] == found["drift_repetition_dense"]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@torch.no_grad()
def test_a_forced_answer_is_read_as_decoding_would_read_it(tiny, text, kind):
    ids = tiny.tokenizer(text.content).input_ids
    prompts = [ids[:60], ids[100:160]]
    dense = greedy(
        tiny.model, tiny.tokenizer, prompts, tiny.caches("dense")("exact"), new_tokens=40, stops=[]
    )
    texts = [(prompts[0], dense[0]), (prompts[1], dense[1][:25])]  # padded on the right
    found = read_answers(tiny.model, tiny.caches(kind), texts, find_head(tiny.model))
    for (prompt, answer), forced in zip(texts, found, strict=True):
        logits = []
        for cache in (tiny.caches("dense")("exact"), tiny.caches(kind)("quantized")):
            rows = [
                tiny.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                for token in [*prompt, *answer[:-1]]
            ]
            logits.append(torch.stack(rows[len(prompt) - 1 :]).log_softmax(-1))
        p, q = logits
        torch.testing.assert_close(
            torch.tensor(forced.kl).double(), (p.exp() * (p - q)).sum(-1), rtol=1e-6, atol=1e-12
        )
        goal = torch.tensor(answer)[:, None]
        torch.testing.assert_close(
            torch.tensor(forced.nll).double(), -q.gather(-1, goal)[:, 0], rtol=1e-6, atol=0
        )
        assert forced.agree == (p.argmax(-1) == q.argmax(-1)).tolist()
        assert sum(forced.kl) > 0.01


def test_free_answers_are_the_caches_own_and_cells_add_up(tiny, text):
    config = Config(**SMALL)
    result = measure(tiny.model, tiny.tokenizer, tiny.caches(), text, config, 0)
    metrics, rows = result.metrics, result.tables["drift"]
    prompts = cut_prompts(tiny.tokenizer(text.content).input_ids, "", config)
    free = greedy(
        tiny.model,
        tiny.tokenizer,
        prompts[:2],
        tiny.caches()("quantized"),
        new_tokens=48,
        stops=[tiny.tokenizer.eos_token_id],
    )
    assert [row["prediction"] for row in result.tables["drift_answers"][:2]] == tiny.tokenizer.batch_decode(
        free
    )
    assert sum(row["tokens"] for row in rows) == 5 * metrics["drift_length_dense"]
    mean = sum(row["kl_e3"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert mean == pytest.approx(metrics["drift_kl_e3"])
    assert metrics["drift_kl_e3_last_quarter"] == pytest.approx(rows[-1]["kl_e3"])
    assert [(row["first"], row["last"], row["context"]) for row in rows[:2]] == [(0, 11, 48), (12, 23, 48)]
    assert metrics["drift_n"] == 5
    assert metrics["code_bytes"] > 0


def test_batches_change_nothing(tiny, text):
    tables = [
        measure(
            tiny.model, tiny.tokenizer, tiny.caches(), text, Config(**{**SMALL, "batch": batch}), 0
        ).tables
        for batch in (1, 5)
    ]
    assert tables[0]["drift_answers"] == tables[1]["drift_answers"]
    for one, five in zip(*(t["drift"] for t in tables), strict=True):
        assert one["kl_e3"] == pytest.approx(five["kl_e3"], rel=1e-9)


def test_what_was_answered_is_not_answered_again(tiny, text, tmp_path, monkeypatch):
    def journals():
        return Journals(Journal(tmp_path / "cache"), Journal(tmp_path / "dense"))

    def run():
        return measure(tiny.model, tiny.tokenizer, tiny.caches(), text, Config(**SMALL), 0, journals())

    first = run()
    lines = (tmp_path / "cache").read_bytes().splitlines(keepends=True)
    (tmp_path / "cache").write_bytes(b"".join(lines[: len(lines) // 2]))  # stopped half-way
    assert run() == first
    monkeypatch.setattr(drift, "greedy", None)
    monkeypatch.setattr(drift, "read_answers", None)
    assert run() == first


def test_first_differences_and_repetition():
    nothing = Forced([], [], [], [])
    assert Answers([1, 2, 3], [1, 2, 3], nothing).first_difference is None
    assert Answers([1, 2, 3], [1, 5, 3], nothing).first_difference == 1
    assert Answers([1, 2, 3], [1, 2], nothing).first_difference == 2
    assert repetition([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21
    assert repetition([1, 2, 3], 2) == 0
    assert repetition([1], 2) == 0


def test_a_short_answer_leaves_later_positions_empty():
    short = Answers([1], [1, 2], Forced([0.5], [1.0], [2.0], [True]))
    config = Config(prompts=1, new_tokens=8, buckets=4)
    metrics = drift.summary([short], config)
    assert metrics["drift_kl_e3_last_quarter"] is None
    assert metrics["drift_kl_se_e3"] is None
    assert metrics["drift_kl_e3"] == 500
    assert metrics["drift_perplexity"] == math.exp(1)
    (row,) = drift.positions([short], config)
    assert (row["first"], row["last"], row["tokens"]) == (0, 1, 1)


def test_refusals(tiny, text):
    with pytest.raises(UserError, match=r"task\.new_tokens=0"):
        Config(new_tokens=0)
    for settings, message in (
        (
            {"prompts": 99},
            r"task\.prompts=99: the text synthetic has 3000 tokens; accepted are up to 50 prompts",
        ),
        ({"new_tokens": 500}, r"task.prompt_tokens\+new_tokens=560: accepted are 2 to 256"),
    ):
        with pytest.raises(UserError, match=message):
            measure(tiny.model, tiny.tokenizer, tiny.caches(), text, Config(**{**SMALL, **settings}), 0)


def test_a_job_measures_drift_and_the_report_draws_it(tmp_path):
    settings = ["task=drift", "task.dataset=synthetic", "task.max_chars=3000", "task.seed=2"]
    settings += [f"task.{name}={value}" for name, value in SMALL.items()]
    config = compose(
        [*SMALL_JOB, *settings, f"out={tmp_path}", "cache.page_size=16", "cache.extended_residual=32"]
    )
    (result,) = run_evaluate(config)
    found = result.metrics
    assert found["drift_kl_e3"] > 0
    assert len(list((tmp_path / "evaluations").glob("drift-answers-*.jsonl"))) == 2
    data = sources.read([Path(found["drift_table"])], "all")
    assert [row["what"] for row in data.positions] == ["answers"] * 4
    assert exhibits(data.positions)[0].title.endswith("answers of 48 tokens")
