"""Questions to passages: SQuAD (qa_1) and HotpotQA (qa_2), from local files in their published JSON forms."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from million_cli.errors import UserError
from million_cli.tasks.ruler.prompt import Prompt

TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nQuestion: {question}"
)
PREFIX = " Answer:"


@dataclass(frozen=True)
class Item:
    """A question, its answers, its passages, and those of the same article, which come before others."""

    question: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Passages:
    """Writes the questions of a dataset in its order, among passages of other questions.

    Attributes:
        items: the questions.
        documents: all passages, each once.
    """

    items: tuple[Item, ...]
    documents: tuple[str, ...]

    least = 1

    @property
    def most(self) -> int:
        return len(self.documents)

    def __call__(self, rng: random.Random, size: int, number: int) -> Prompt:
        item = self.items[number]
        chosen = list(item.own)
        near = rng.sample(item.near, len(item.near))
        chosen += near[: max(0, size - len(chosen))]
        taken = {*item.own, *item.near}
        # One order of all passages for a question: a larger size adds to a smaller one.
        others = (text for text in rng.sample(self.documents, len(self.documents)) if text not in taken)
        while len(chosen) < size and (text := next(others, None)) is not None:
            chosen.append(text)
        rng.shuffle(chosen)
        context = "\n\n".join(f"Document {place}:\n{text}" for place, text in enumerate(chosen, 1))
        return Prompt(TEXT.format(context=context, question=item.question), PREFIX, item.answers)


def read(path: str, dataset: str) -> Passages:
    """The questions of a file.

    Args:
        path: a JSON file.
        dataset: `squad` (1.1 or 2.0; questions without an answer are left out) or `hotpotqa`.

    Raises:
        UserError: the file cannot be read, or is not of that form.
    """
    try:
        found = READERS[dataset](json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"task.{dataset}={path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"task.{dataset}={path}: not the JSON of {dataset}, as it was published") from error
    if not found.items:
        raise UserError(f"task.{dataset}={path}: holds no questions")
    return found


def _squad(data: Any) -> Passages:
    items = []
    documents = {part["context"] for article in data["data"] for part in article["paragraphs"]}
    for article in data["data"]:
        contexts = dict.fromkeys(part["context"] for part in article["paragraphs"])
        for part in article["paragraphs"]:
            near = tuple(text for text in contexts if text != part["context"])
            for asked in part["qas"]:
                if not asked.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    items.append(Item(asked["question"], answers, (part["context"],), near))
    return Passages(tuple(items), tuple(sorted(documents)))


def _hotpotqa(data: Any) -> Passages:
    items = []
    for asked in data:
        own = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"])
        items.append(Item(asked["question"], (asked["answer"],), own))
    return Passages(tuple(items), tuple(sorted({text for item in items for text in item.own})))


READERS: dict[str, Callable[[Any], Passages]] = {"squad": _squad, "hotpotqa": _hotpotqa}
