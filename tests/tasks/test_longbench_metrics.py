"""LongBench's metrics against values computed by hand; the arithmetic stands beside each."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.tasks.longbench import metrics
from million_cli.tasks.longbench.datasets import DATASETS


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # cat sat on mat / cat on mat: 3 words in common, P = 3/4, R = 3/3, F1 = 2 * 3/4 / (7/4)
        ("The cat sat on the mat!", "a cat on a mat", 6 / 7),
        # as bags: no once, yes once in common; P = R = 2/3
        ("no no yes", "no yes yes", 2 / 3),
        ("U.S.A.", "usa", 1.0),
        # only whole words are articles: theatre stays
        ("the theatre", "theatre", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "the", 0.0),  # nothing is left on either side
    ],
)
def test_qa_f1(prediction, answer, expected):
    assert metrics.qa_f1(prediction, answer) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # 我/来到/北京/清华大学 and 北京/清华大学: P = 2/4, R = 2/2, F1 = 2 * 1/2 / (3/2)
        ("我来到北京清华大学", "北京清华大学", 2 / 3),
        ("北京，清华大学。", "北京 清华大学", 1.0),
        ("USA。", "usa", 1.0),
        ("，。", "北京", 0.0),
        # 《 is not among the published punctuation, 》 is: 《/红楼梦 and 红楼梦, P = 1/2, R = 1
        ("《红楼梦》", "红楼梦", 2 / 3),
    ],
)
def test_qa_f1_zh(prediction, answer, expected):
    assert metrics.qa_f1_zh(prediction, answer) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # longest common subsequence: the cat; P = R = 2/3
        ("the cat sat", "the cat ran", 2 / 3),
        # sentences of the prediction together cover w1 w2 w3 w5 of the answer's 5 words; the prediction has 8
        # different words: R = 4/5, P = 4/8, F = 2 * 4/5 * 1/2 / (13/10)
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.8 / 1.3),
        ("same words here", "same words here", 1.0),
        ("nothing alike", "quite different", 0.0),
        ("", "an answer", 0.0),
        ("an answer", "...", 0.0),
    ],
)
def test_rouge(prediction, answer, expected):
    # The package adds 1e-8 to a denominator.
    assert metrics.rouge(prediction, answer) == pytest.approx(expected, abs=1e-7)


def test_rouge_goes_deeper_than_python_by_itself():
    words = " ".join(f"w{i}" for i in range(400))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(400)  # the usual 1000 takes longer
    try:
        assert metrics.rouge(words, words) == pytest.approx(1.0, abs=1e-7)
        assert sys.getrecursionlimit() == 400
    finally:
        sys.setrecursionlimit(before)


def test_rouge_zh_is_rouge_of_words():
    # 我 来到 北京 清华大学 and 北京 清华大学: P = 2/4, R = 1
    assert metrics.rouge_zh("我来到北京清华大学", "北京清华大学") == pytest.approx(2 / 3, abs=1e-7)
    assert metrics.rouge_zh("", "北京") == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Date", "Date", ["Food", "Date"], 1.0),
        ("Date or Food", "Date", ["Food", "Date", "City"], 1 / 2),
        ("Food", "Date", ["Food", "Date"], 0.0),
        ("", "Date", ["Food", "Date"], 0.0),
        # a class inside the answer's name does not count
        ("Other entity", "Other entity", ["entity", "Other entity"], 1.0),
        # ... but the one behind it is passed over, and counts: entity, Other entity
        ("Other entity", "Other entity", ["Other", "entity", "Other entity"], 1 / 2),
        # a longer class than the answer counts
        ("Other entity", "entity", ["entity", "Other entity"], 1 / 2),
        ("类别：体育", "体育", ["体育", "经济"], 1.0),
    ],
)
def test_classification(prediction, answer, classes, expected):
    assert metrics.classification(prediction, answer, classes) == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), unique=True, min_size=1),
    st.text("ab", max_size=6),
    st.data(),
)
def test_classification_is_what_removing_from_a_walked_list_gives(classes, prediction, data):
    answer = data.draw(st.sampled_from(classes))
    left = [name for name in classes if name in prediction]
    at = 0
    while at < len(left):  # the place moves on also when what was there is gone
        if left[at] != answer and left[at] in answer:
            del left[at]
        at += 1
    expected = 1 / len(left) if answer in left else 0.0
    assert metrics.classification(prediction, answer, classes) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Paragraph 3", 1.0), ("3 or 4, no: 3", 2 / 3), ("13", 0.0), ("none", 0.0), ("", 0.0)],
)
def test_retrieval_is_a_share_of_numbers(prediction, expected):
    assert metrics.retrieval(prediction, "Paragraph 3") == expected
    assert metrics.retrieval_zh(prediction, "段落3") == expected
    assert metrics.count(prediction, "3") == expected


def test_retrieval_reads_its_own_language():
    assert metrics.retrieval("3", "段落3") == 0.0
    assert metrics.retrieval_zh("段落24和2", "段落24") == 1 / 2


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return x", "return x", 1.0),
        # one deletion and one insertion among 8 characters: 6/8
        ("// a comment\n# another\n`quoted`\nabcd\nrest", "abce", 0.75),
        ("\n\n\nx = 1\ny", "x = 1", 1.0),
        # one insertion among 3 characters: 2/3, in whole percent
        ("a", "ab", 0.67),
        # 2 of 16 characters match: 12.5 %, and Python rounds a half to even
        ("abcdefgh", "aijklmno", 0.12),
        # insertions and deletions alone: ababab -> aaab -> aaaaab, 2 + 2 of 12
        ("ababab", "aaaaab", 0.67),
        ("# only comments", "x", 0.0),
        ("", "x", 0.0),
        ("", "", 1.0),
    ],
)
def test_code_similarity(prediction, answer, expected):
    assert metrics.code_similarity(prediction, answer) == expected


def test_a_dataset_takes_the_best_answer_and_the_first_line_where_published():
    assert DATASETS["qasper"].score("yes", ["no", "yes"], []) == 1.0
    # trec: one class on the first line, another behind it; passage_count keeps all lines
    assert DATASETS["trec"].score("\n\nDate\nFood", ["Date"], ["Food", "Date"]) == 1.0
    assert DATASETS["trec"].score(" \nDate", ["Date"], ["Food", "Date"]) == 0.0
    assert DATASETS["passage_count"].score("10\n11", ["10"], []) == 0.5
