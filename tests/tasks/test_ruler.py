"""RULER runs: lengths, scores beside the dense cache, resumption, chat templates, the whole pipeline."""

from __future__ import annotations

import json

import pytest
from small_job import SMALL_JOB

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.journal import Journal, Journals
from million_cli.pipelines.evaluate import run_evaluate
from million_cli.tasks.ruler.definitions import DEFINITIONS, Material
from million_cli.tasks.ruler.niah import Essay
from million_cli.tasks.ruler.qa import read
from million_cli.tasks.ruler.task import Config, Source, ask, load, measure
from million_cli.text import synthetic_text

TEXT = " ".join(f"{sentence}." for sentence in synthetic_text(4, 60_000).split("."))
SOURCE = Source(TEXT, "made here")
OFFLINE = [name for name, definition in DEFINITIONS.items() if not definition.dataset]


@pytest.fixture
def long(tiny, monkeypatch):
    """The tiny model for 4096 tokens: its tokenizer reads bytes."""
    monkeypatch.setattr(tiny.model.config, "max_position_embeddings", 4096)
    return tiny


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("length", [3000, 12_000])
def test_prompts_fill_their_length(tiny, name, length):
    material = Material(Essay(TEXT), [f"word{i:03}" for i in range(1000)])
    config = Config(samples=3)
    questions = ask(tiny.tokenizer, material, name, length, config, 0, chat=False)
    unit = 100 if name.startswith(("niah_single_1", "vt", "niah_multikey_2")) else 130
    if name == "cwe":
        unit = 6 * 14
    for question in questions:
        total = len(question.ids) + DEFINITIONS[name].new_tokens
        assert length - max(unit, length // 100) <= total <= length
    assert len({tuple(question.ids) for question in questions}) == 3
    again = ask(tiny.tokenizer, material, name, length, Config(samples=1), 0, chat=False)
    assert again == questions[:1], "a question does not depend on how many there are"
    other = ask(tiny.tokenizer, material, name, length, Config(samples=1), 1, chat=False)
    assert other != again, "the seed counts"


@pytest.mark.parametrize("kind", ["dense", "contiguous", "paged"])
def test_scores_stand_beside_the_dense_caches(long, kind):
    config = Config(lengths=[1000], samples=3, batch=3, tasks=["niah_single_1", "fwe"])
    result = measure(long.model, long.tokenizer, long.caches(kind), SOURCE, config, 0)
    metrics, cells = result.metrics, result.tables["ruler"]
    assert [(row["task"], row["length"], row["samples"]) for row in cells] == [
        ("niah_single_1", 1000, 3),
        ("fwe", 1000, 3),
    ]
    rows = result.tables["ruler_samples"]
    assert metrics["ruler_n"] == len(rows) == 6
    for row in rows:
        score = 100 * DEFINITIONS[row["task"]].score(row["prediction"], json.loads(row["answers"]))
        assert row["score"] == score
    if kind == "dense":
        assert all(row["prediction"] == row["prediction_dense"] for row in rows)
        assert metrics["ruler_difference"] == metrics["ruler_difference_low"] == 0.0
    else:
        assert metrics["cache_tokens"] == max(row["tokens"] for row in rows)
    assert metrics["ruler_average"] == metrics["ruler_1000"]
    assert metrics["ruler_chat"] is False


def test_answers_are_kept_and_the_dense_ones_shared(long, tmp_path):
    asked = []

    def caches(prefill):
        asked.append(prefill)
        return long.caches("contiguous")(prefill)

    config = Config(lengths=[1000], samples=2, batch=2, tasks=["fwe"], prefill="exact")

    def run(name):
        journals = Journals(Journal(tmp_path / name), Journal(tmp_path / "dense"))
        found = measure(long.model, long.tokenizer, caches, SOURCE, config, 0, journals)
        return found, len(journals.cache), len(journals.dense)

    first, ours, dense = run("a")
    assert (ours, dense, asked) == (2, 2, ["exact", "exact"])  # the second is for the memory
    again, *_ = run("a")
    assert again == first
    assert len(asked) == 3, "no answer is made again"
    other, ours, dense = run("b")
    assert (ours, dense) == (2, 2)
    assert other == first


TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_a_chat_template_is_used_where_there_is_one(long, monkeypatch):
    def prompt(chat):
        config = Config(lengths=[700], samples=1, tasks=["fwe"], chat=chat)
        result = measure(long.model, long.tokenizer, long.caches("dense"), SOURCE, config, 0)
        return result.metrics["ruler_chat"]

    with pytest.raises(UserError, match=r"task\.chat=true: the tokenizer has no chat template"):
        prompt("true")
    monkeypatch.setattr(long.tokenizer, "chat_template", TEMPLATE)
    assert [prompt(chat) for chat in ("auto", "true", "false")] == [True, True, False]
    material = Material(Essay(TEXT), [])
    (question,) = ask(long.tokenizer, material, "vt", 3000, Config(samples=1), 0, chat=True)
    said = long.tokenizer.decode(question.ids)
    assert said.startswith("[Memorize and track")
    assert "in the text above.]> Answer: According to" in said
    assert len(question.ids) + 30 <= 3000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["niah"]}, r"task\.tasks=niah: accepted are niah_single_1"),
        ({"tasks": ["qa_1"]}, r"task\.tasks=qa_1: needs the file of squad; name it by task\.squad="),
        ({"tasks": ["qa_2"]}, r"needs the file of hotpotqa"),
        ({"tasks": []}, r"task\.tasks=\[\]"),
        ({"lengths": []}, r"task\.lengths=\[\]"),
        ({"samples": 0}, r"task\.samples=0"),
        ({"chat": "yes"}, r"task\.chat=yes: accepted are auto, true, false"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_lengths_that_cannot_be(long):
    def run(**settings):
        config = Config(samples=1, **settings)
        measure(long.model, long.tokenizer, long.caches("dense"), SOURCE, config, 0)

    with pytest.raises(UserError, match=r"task\.lengths=5000: accepted are 2 to 4096"):
        run(lengths=[5000])
    with pytest.raises(UserError, match=r"task\.lengths=200: question 0 of niah_single_1 takes \d+ tokens"):
        run(lengths=[200], tasks=["niah_single_1"])
    few = Material(Essay("Short."), [f"word{i}" for i in range(30)])
    with pytest.raises(UserError, match=r"task\.lengths=4000: the text has words for \d+ tokens of cwe"):
        ask(long.tokenizer, few, "cwe", 4000, Config(samples=1), 0, chat=False)


def test_questions_of_a_file(long, tmp_path):
    path = tmp_path / "squad.json"
    qas = [{"question": "which?", "answers": [{"text": "this"}]}]
    paragraphs = [{"context": f"{i} " * 60, "qas": qas} for i in range(20)]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    config = Config(lengths=[1200], samples=2, tasks=["qa_1"], squad=str(path), dataset="synthetic")
    source = load(config)
    assert set(source.files) == {"squad"}
    assert source.passages["squad"] == read(str(path), "squad")
    result = measure(long.model, long.tokenizer, long.caches("dense"), source, config, 0)
    assert all(1000 < row["tokens"] + 32 <= 1200 for row in result.tables["ruler_samples"])
    with pytest.raises(UserError, match=r"task\.samples=21: squad has 20 questions"):
        measure(
            long.model,
            long.tokenizer,
            long.caches("dense"),
            source,
            Config(lengths=[1200], samples=21, tasks=["qa_1"], squad=str(path)),
            0,
        )


def test_the_whole_pipeline(tmp_path):
    settings = ["task=ruler", "task.tasks=[fwe]", "task.lengths=[700]", "task.samples=2"]
    config = compose([*SMALL_JOB, *settings, f"out={tmp_path}", "task.dataset=synthetic", "task.seed=9"])
    (result,) = run_evaluate(config)
    assert result.metrics["ruler_n"] == 2
    assert result.metrics["ruler_table"].endswith("-ruler.csv")
    (again,) = run_evaluate(config)
    assert again.metrics["reused_from"]
