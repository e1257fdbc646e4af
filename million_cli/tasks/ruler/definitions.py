"""The thirteen tasks: RULER's `synthetic.yaml` and the answers' lengths of its `constants.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from million_cli.tasks.ruler.aggregation import CommonWords, FrequentWords
from million_cli.tasks.ruler.niah import Essay, Needles
from million_cli.tasks.ruler.prompt import Writer
from million_cli.tasks.ruler.qa import Passages
from million_cli.tasks.ruler.tracing import Tracing


@dataclass(frozen=True)
class Material:
    """The material of prompts: prose, its words, and the datasets."""

    essay: Essay
    words: Sequence[str]
    passages: Mapping[str, Passages] = field(default_factory=dict)


def all_of(answer: str, references: Sequence[str]) -> float:
    """The share of the references that the answer contains, case ignored (`string_match_all`)."""
    answer = cleaned(answer)
    return sum(reference.lower() in answer for reference in references) / len(references)


def any_of(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains one of the references, case ignored, else 0 (`string_match_part`)."""
    answer = cleaned(answer)
    return float(any(reference.lower() in answer for reference in references))


def cleaned(answer: str) -> str:
    """An answer as it is scored: control characters become newlines."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()


Make = Callable[[Material, int, Callable[[str], int]], Writer]


@dataclass(frozen=True)
class Definition:
    """A task.

    Attributes:
        new_tokens: generated for an answer.
        make: from material, length in tokens and a counter of tokens, what writes the prompts.
        score: of an answer against its references, 0 to 1.
        dataset: that must be given as a file.
    """

    new_tokens: int
    make: Make
    score: Callable[[str, Sequence[str]], float] = all_of
    dataset: str | None = None


def needles(
    haystack: str,
    key: str = "words",
    value: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Definition:
    return Definition(
        128,
        lambda material, length, count: Needles(haystack, material.essay, key, value, keys, values, queries),
    )


def questions(dataset: str) -> Definition:
    return Definition(32, lambda material, length, count: material.passages[dataset], any_of, dataset)


DEFINITIONS = {
    "niah_single_1": needles("noise"),
    "niah_single_2": needles("essay"),
    "niah_single_3": needles("essay", value="uuids"),
    "niah_multikey_1": needles("essay", keys=4),
    "niah_multikey_2": needles("needle"),
    "niah_multikey_3": needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": needles("essay", values=4),
    "niah_multiquery": needles("essay", keys=4, queries=4),
    "vt": Definition(30, lambda material, length, count: Tracing(length, count)),
    "cwe": Definition(120, lambda material, length, count: CommonWords(length, material.words)),
    "fwe": Definition(50, lambda material, length, count: FrequentWords(length - 50)),
    "qa_1": questions("squad"),
    "qa_2": questions("hotpotqa"),
}
