"""The recall format: properties of prompts, for additive tokenizers and for one that is not."""

from __future__ import annotations

import re

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli.errors import UserError
from million_cli.tasks.recall_text import NAMES, WORDS, Filler, is_correct, recall_grid, recall_prompt

SENTENCES = [f"{'word ' * (3 + 7 * i % 23)}number{i}." for i in range(90)]
TEXT = " ".join(SENTENCES)
FACT = re.compile(r" The password of (\w+) is (\w+)\.")


def count_words(text: str) -> int:
    return len(text.split())


def count_with_prefix(text: str) -> int:
    """As a tokenizer that puts a token before every string: pieces do not add up."""
    return len(text.split()) + 1


def test_words_are_distinct() -> None:
    assert len(set(NAMES)) == len(NAMES) == 73
    assert len(set(WORDS)) == len(WORDS) == 153
    assert all(word.isalpha() for word in NAMES + WORDS)


@examples(60)
@given(
    length=st.integers(120, 3000),
    seed=st.integers(0, 10**6),
    depth=st.none() | st.floats(0, 1),
    facts=st.integers(1, 8),
    count=st.sampled_from([count_words, count_with_prefix]),
)
def test_prompt_states_what_it_asks(length: int, seed: int, depth: float | None, facts: int, count) -> None:
    filler = Filler(TEXT, count)
    item = recall_prompt(filler, length, seed, depth=depth, facts=facts)
    assert item == recall_prompt(filler, length, seed, depth=depth, facts=facts)
    assert item.tokens == count(item.prompt)
    assert item.tokens == length if count is count_words else length - 8 <= item.tokens <= length

    body, question = item.prompt.split(" Question: ")
    name = item.asked.name
    assert question == f"what is the password of {name}? Answer: the password of {name} is"
    assert item.answer == f" {item.asked.word}"
    assert FACT.findall(body) == [(fact.name, fact.word) for fact in item.facts]
    assert len({fact.name for fact in item.facts}) == len({fact.word for fact in item.facts}) == facts
    assert item.asked in item.facts
    # Without the facts, the filler is a passage of the text (which repeats), cut at the end of a sentence.
    passage = FACT.sub("", body)
    assert passage in f"{TEXT} " * (2 + len(passage) // len(TEXT))
    assert passage.endswith(".")


@examples(30)
@given(seed=st.integers(0, 1000), depth=st.floats(0, 1))
def test_depth_is_where_the_fact_stands(seed: int, depth: float) -> None:
    filler = Filler(TEXT, count_words)
    item = recall_prompt(filler, 1000, seed, depth=depth)
    before, after = item.prompt.split(item.asked.text)
    text_words = len(before.split()) + len(after.split(" Question: ")[0].split())
    assert item.asked.depth == pytest.approx(len(before.split()) / text_words)
    # To the nearest end of a sentence: half a sentence (26 words) away, a whole one at depth 0.
    assert abs(item.asked.depth - depth) <= 26 / text_words


def test_depth_moves_the_asked_fact_only() -> None:
    filler = Filler(TEXT, count_words)
    early, late = (recall_prompt(filler, 800, "seed", depth=depth, facts=5) for depth in (0.0, 1.0))
    assert (early.asked.name, early.asked.word) == (late.asked.name, late.asked.word)
    assert early.facts[0] == early.asked
    assert late.facts[-1] == late.asked
    assert late.asked.depth == 1
    assert [f for f in early.facts if f != early.asked] == [f for f in late.facts if f != late.asked]
    assert early.prompt.replace(early.asked.text, "") == late.prompt.replace(late.asked.text, "")


def test_grid_covers_every_cell_and_seeds_differ() -> None:
    filler = Filler(TEXT, count_words)
    cells = list(recall_grid(filler, [150, 400], [0.0, 0.5], 3, facts=2, seed=1))
    assert [(length, depth) for length, depth, _ in cells] == [
        (length, depth) for length in (150, 400) for depth in (0.0, 0.5) for _ in range(3)
    ]
    assert all(item.tokens <= length for length, _, item in cells)
    assert len({item.prompt for *_, item in cells}) == len(cells)
    assert cells[0][2].asked.name == cells[3][2].asked.name  # the same sample at another depth
    other = list(recall_grid(filler, [150, 400], [0.0, 0.5], 3, facts=2, seed=2))
    assert all(a[2].prompt != b[2].prompt for a, b in zip(cells, other, strict=True))


def test_answers_are_judged_by_their_first_word() -> None:
    item = recall_prompt(Filler(TEXT, count_words), 200, 0)
    word = item.asked.word
    for completion in (f" {word}", f" {word}.\n\nThe", f' "{word.capitalize()}", she said', f"\n{word}"):
        assert is_correct(completion, item)
    for completion in ("", " ", f" {word}s", f" the {word}", " ...", f" not {word}"):
        assert not is_correct(completion, item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": 0}, "facts=0: accepted are 1 to 73"),
        ({"facts": 74}, "facts=74: accepted are 1 to 73"),
        ({"depth": 1.5}, "depth=1.5: accepted are 0"),
        ({"depth": -0.1}, "depth=-0.1: accepted are 0"),
        ({"length": 19}, "length=19: facts=1 and the question take"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    arguments = {"length": 300, "seed": 0} | change
    with pytest.raises(UserError, match=re.escape(message)):
        recall_prompt(Filler(TEXT, count_words), **arguments)


def test_blank_text_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Filler(" \n ", count_words)
