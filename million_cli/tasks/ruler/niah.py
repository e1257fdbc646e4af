"""Needles in a haystack: facts such as "... magic numbers for KEY is: VALUE.", some of them asked for."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from million_cli.tasks.ruler import words
from million_cli.tasks.ruler.prompt import Prompt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100 * step / 39) for step in range(40)]
"""Per cent of the essay's sentences before a needle: 40 of them, from 0 to 100."""

ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
RANDOM: dict[str, Callable[[random.Random], str]] = {
    "words": words.key,
    "numbers": words.number,
    "uuids": words.uuid4,
}


class Essay:
    """Prose, by sentences; it begins anew where it ends."""

    def __init__(self, text: str) -> None:
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        self.sentences = [sentence.split() for sentence in sentences]

    def take(self, rng: random.Random, size: int) -> list[str]:
        """Sentences with `size` words in all, from a random one on; the last may be cut."""
        place = rng.randrange(len(self.sentences))
        taken: list[str] = []
        while size > 0:
            sentence = self.sentences[place % len(self.sentences)][:size]
            taken.append(" ".join(sentence))
            size -= len(sentence)
            place += 1
        return taken


@dataclass(frozen=True)
class Needles:
    """Writes prompts of one needle task.

    Attributes:
        haystack: `noise`, `essay` or `needle` (other facts of the same form).
        essay: the prose, for the haystack of that name.
        key: `words` or `uuids`.
        value: `numbers` or `uuids`.
        keys: facts' keys.
        values: facts a key.
        queries: keys that are asked for.
    """

    haystack: str
    essay: Essay
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def least(self) -> int:
        return self.keys * self.values

    @property
    def most(self) -> int | None:
        # Half of all pairs of words: distinct ones are found quickly.
        fewer = self.haystack == "needle" and self.key == "words"
        return len(words.ADJECTIVES) * len(words.NOUNS) // 2 if fewer else None

    def __call__(self, rng: random.Random, size: int, number: int) -> Prompt:
        used: set[str] = set()
        facts = {
            distinct(RANDOM[self.key], rng, used): [RANDOM[self.value](rng) for _ in range(self.values)]
            for _ in range(self.keys)
        }
        queries = rng.sample(list(facts), self.queries)
        needles = [self._fact(key, value) for key, values in facts.items() for value in values]
        rng.shuffle(needles)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        if self.haystack == "essay":
            context = " ".join(buried(self.essay.take(rng, size), needles, depths))
        else:
            lines = [NOISE] * size
            if self.haystack == "needle":
                lines = [
                    self._fact(distinct(RANDOM[self.key], rng, used), RANDOM[self.value](rng))
                    for _ in range(size)
                ]
            for place, needle in zip(
                sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True
            ):
                lines.insert(place, needle)
            context = "\n".join(lines)
        one = self.queries * self.values == 1
        kind = self.value.removesuffix("s") if one else self.value
        query = queries[0] if self.queries == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        text, prefix = (
            part.format(kind=kind, context=context, query=query) for part in (ONE if one else SEVERAL)
        )
        return Prompt(text, prefix, tuple(value for key in queries for value in facts[key]))

    def _fact(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)


def buried(sentences: list[str], needles: list[str], depths: list[int]) -> list[str]:
    """Sentences with each needle after its share (per cent, ascending) of them."""
    parts: list[str] = []
    start = 0
    for needle, depth in zip(needles, depths, strict=True):
        end = len(sentences) * depth // 100
        parts += [*sentences[start:end], needle]
        start = end
    return parts + sentences[start:]


def distinct(make: Callable[[random.Random], str], rng: random.Random, used: set[str]) -> str:
    """A random value that is not in `used`, and then is: no two facts have one key."""
    while (found := make(rng)) in used:
        pass
    used.add(found)
    return found
