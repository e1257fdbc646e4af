"""RULER's prompts by their definitions, their lengths, and its scores."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.errors import UserError
from million_cli.tasks.ruler import qa
from million_cli.tasks.ruler.aggregation import CommonWords, FrequentWords, vocabulary
from million_cli.tasks.ruler.definitions import DEFINITIONS, all_of, any_of
from million_cli.tasks.ruler.fitting import fitted
from million_cli.tasks.ruler.niah import DEPTHS, NOISE, Essay, Needles, buried
from million_cli.tasks.ruler.tracing import Tracing

ESSAY = Essay(" ".join(f"Sentence {i} has exactly six words." for i in range(50)))
FACT = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def test_thirteen_tasks_and_the_lengths_of_their_answers():
    assert {name: each.new_tokens for name, each in DEFINITIONS.items()} == {
        **{f"niah_single_{i}": 128 for i in (1, 2, 3)},
        **{f"niah_multikey_{i}": 128 for i in (1, 2, 3)},
        "niah_multivalue": 128,
        "niah_multiquery": 128,
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }
    assert [name for name, each in DEFINITIONS.items() if each.score is any_of] == ["qa_1", "qa_2"]


@pytest.mark.parametrize(
    ("needles", "facts", "answers", "one"),
    [
        (Needles("noise", ESSAY), 1, 1, "number"),
        (Needles("essay", ESSAY), 1, 1, "number"),
        (Needles("essay", ESSAY, value="uuids"), 1, 1, "uuid"),
        (Needles("essay", ESSAY, keys=4), 4, 1, "number"),
        (Needles("needle", ESSAY), 31, 1, "number"),
        (Needles("needle", ESSAY, key="uuids", value="uuids"), 31, 1, "uuid"),
        (Needles("essay", ESSAY, values=4), 4, 4, None),
        (Needles("essay", ESSAY, keys=4, queries=4), 4, 4, None),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_needles(needles, facts, answers, one, seed):
    prompt = needles(random.Random(seed), 30, 0)
    found = FACT.findall(prompt.text)
    assert len(found) == facts
    assert len({key for _, key, _ in found}) == facts // needles.values, "keys are distinct"
    assert len(prompt.answers) == answers
    assert {kind for kind, _, _ in found} == {needles.value}
    for _, key, value in found:
        assert UUID.fullmatch(key) if needles.key == "uuids" else re.fullmatch(r"[a-z]+-[a-z]+", key)
        assert UUID.fullmatch(value) if needles.value == "uuids" else re.fullmatch(r"[1-9]\d{6}", value)
    query = re.search(r" for (.*) mentioned in the provided text\?$", prompt.text)[1]
    asked = query.replace("and ", "").split(", ")
    by_key = {}
    for _, key, value in found:
        by_key.setdefault(key, []).append(value)
    assert sorted(prompt.answers) == sorted(value for key in asked for value in by_key[key])
    if one:
        assert prompt.text.startswith(f"A special magic {one} is hidden within the following text.")
        assert f"\nWhat is the special magic {one} for" in prompt.text
        assert prompt.prefix == f" The special magic {one} for {query} mentioned in the provided text is"
    else:
        assert prompt.text.startswith("Some special magic numbers are hidden within the following text.")
        assert "\nWhat are all the special magic numbers for" in prompt.text
        assert prompt.prefix == f" The special magic numbers for {query} mentioned in the provided text are"
    context = prompt.text.split("afterwards.\n")[1].rsplit("\nWhat ", 1)[0]
    if needles.haystack == "noise":
        assert context.split("\n").count(NOISE) == 30
    if needles.haystack == "essay":
        assert len(FACT.sub("", context).split()) == 30


def test_needles_stand_at_their_depths():
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[-1], DEPTHS[1]) == (40, 0, 100, 3)
    sentences = [str(i) for i in range(10)]
    assert buried(sentences, ["a", "b", "c"], [0, 31, 100]) == ["a", *"012", "b", *"3456789", "c"]


@given(st.integers(0, 1000), st.integers(1, 700))
def test_essays_have_so_many_words_and_begin_with_a_sentence(seed, size):
    sentences = ESSAY.take(random.Random(seed), size)
    assert sum(len(sentence.split()) for sentence in sentences) == size
    assert sentences[0].startswith("Sentence")


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_five_variables_after_an_answered_example(seed):
    tracing = Tracing(2048, lambda text: len(text.split()))
    prompt = tracing(random.Random(seed), 40, 0)
    example, asked = prompt.text.split("\n\nMemorize")
    assert len(example.split()) <= 500
    head, _, answer = example.rpartition("they are: ")
    lines = {}
    for part, letters in ((head, 3), (asked, 5)):
        first = re.search(rf"^VAR ([A-Z]{{{letters}}}) = (\d{{5}})$", part, re.M)
        hops = re.findall(rf"^VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}}) $", part, re.M)
        assert [before for _, before in hops] == [first[1], *(name for name, _ in hops[:-1])], "in order"
        lines[letters] = [first[1], *(name for name, _ in hops)]
        assert f"assigned the value {first[2]} in the text above." in part
    assert answer.split() == lines[3]
    assert prompt.answers == tuple(lines[5])
    assert len(set(prompt.answers)) == 5
    assert asked.count(NOISE) == 40
    assert prompt.prefix.endswith(f"5 variables are assigned the value {first[2]}, they are: ")


@pytest.mark.parametrize(("length", "often", "seldom", "example"), [(4095, 6, 1, 40), (4096, 30, 3, 190)])
def test_common_words_stand_more_often(length, often, seldom, example):
    words = vocabulary("")
    prompt = CommonWords(length, words)(random.Random(1), 25, 0)
    first, second = (part.split("\nQuestion:")[0] for part in prompt.text.split("appear most often.\n")[1:])
    counts = Counter(re.findall(r"\d+\. (\S+)", second))
    assert set(counts.values()) == {often, seldom}
    assert sorted(word for word, n in counts.items() if n == often) == sorted(prompt.answers)
    assert (len(counts), len(prompt.answers)) == (25, 10)
    assert [int(n) for n in re.findall(r"(\d+)\. ", second)] == list(range(1, sum(counts.values()) + 1))
    assert len(re.findall(r"\d+\. ", first)) == example
    answered = prompt.text.split("in the list are:")[1].split("\n")[0]
    most = Counter(re.findall(r"\d+\. (\S+)", first)).most_common(10)
    assert sorted(re.findall(r"\d+\. (\S+)", answered)) == sorted(word for word, _ in most)


@pytest.mark.parametrize("size", [60, 500])
def test_counts_of_coded_words_fall_with_the_square_of_the_rank(size):
    prompt = FrequentWords(1000)(random.Random(2), size, 0)
    words = prompt.text.split("coded words. ")[1].split("\nQuestion:")[0].split()
    ranked = Counter(words).most_common()
    expected = [int(size * 6 / 3.141592653589793**2 / rank**2) for rank in range(1, 21)]
    assert [n for _, n in ranked] == [n for n in expected if n]
    assert ranked[0][0] == "..."
    assert prompt.answers == tuple(word for word, _ in ranked[1:4])
    assert all(re.fullmatch("[a-z]{6}", word) for word in words if word != "...")


def squad(tmp_path):
    answer = [{"text": "forty", "answer_start": 0}, {"text": "40", "answer_start": 0}]
    data = [
        {
            "paragraphs": [
                {
                    "context": f"passage {article}{part}",
                    "qas": [
                        {"question": f"how many {article}{part}?", "is_impossible": False, "answers": answer},
                        {"question": "unknown?", "is_impossible": True, "answers": []},
                    ],
                }
                for part in "abc"
            ]
        }
        for article in range(4)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": data}))
    return path


def test_squad_takes_passages_of_the_same_article_first(tmp_path):
    passages = qa.read(str(squad(tmp_path)), "squad")
    assert (len(passages.items), passages.most) == (12, 12)
    for size in range(1, 13):
        prompt = passages(random.Random(3), size, 4)
        shown = re.findall(r"Document \d+:\n(passage \S+)", prompt.text)
        assert (len(shown), len(set(shown))) == (size, size)
        assert "passage 1b" in shown
        same = sum(text.startswith("passage 1") for text in shown)
        assert same == min(size, 3)
    assert prompt.answers == ("forty", "40")
    assert prompt.text.endswith("\n\nQuestion: how many 1b?")
    assert prompt.prefix == " Answer:"


def test_hotpotqa(tmp_path):
    path = tmp_path / "hotpot.json"
    data = [
        {"question": f"q{i}", "answer": "yes", "context": [[f"T{i}{j}", ["One.", " Two."]] for j in range(2)]}
        for i in range(3)
    ]
    path.write_text(json.dumps(data))
    passages = qa.read(str(path), "hotpotqa")
    prompt = passages(random.Random(0), 5, 1)
    shown = re.findall(r"Document \d+:\n(T\d\d)\nOne. Two.", prompt.text)
    assert len(set(shown)) == 5
    assert {"T10", "T11"} <= set(shown)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"data": []}', '{"data": [{"paragraphs": 3}]}', "[1]", "\x00"]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    for dataset in ("squad", "hotpotqa"):
        with pytest.raises(UserError, match=rf"task\.{dataset}=.*x\.json"):
            qa.read(str(path), dataset)
    with pytest.raises(UserError, match=r"task\.squad=/nowhere: No such file"):
        qa.read("/nowhere", "squad")


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(0, 1000),
    st.integers(1, 20),
    st.one_of(st.none(), st.integers(20, 90)),
    st.one_of(st.none(), st.integers(1, 200)),
    st.integers(0, 50),
)
def test_the_largest_that_fits_is_found(steps, room, least, most, guess, slack):
    """Sizes cost what the steps say, over and over."""

    def tokens(size):
        assert size >= least
        assert most is None or size <= most
        return sum(steps) * (size // len(steps)) + sum(steps[: size % len(steps)])

    found = fitted(tokens, room, least, most, guess, slack)
    if found is None:
        assert tokens(least) > room
        return
    assert tokens(found) <= room
    assert found == most or room - tokens(found) <= slack or tokens(found + 1) > room


def test_scores():
    assert all_of("They are 12 and ABC", ["abc", "12", "34", "56"]) == 0.5
    assert all_of("12\x00", ["12"]) == 1.0
    assert any_of("It is Forty.", ["40", "forty"]) == 1.0
    assert any_of("", ["40", "forty"]) == 0.0
