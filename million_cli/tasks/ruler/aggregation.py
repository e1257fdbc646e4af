"""Counting: the common words of a list, the frequent words of a coded text."""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from million_cli.tasks.ruler.prompt import Prompt
from million_cli.tasks.ruler.words import ADJECTIVES, NOUNS

COMMON = 10
SHORT = 4096
"""Below it words are repeated less often, and the example is shorter."""

COMMON_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the "
    "dots '....'. What are the three most frequently appeared words in the above coded text?"
)
FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
LETTERS = 6
TOKENS_A_WORD = 50
ALPHA = 2
ZETA = math.pi**2 / 6  # Riemann's zeta function at ALPHA


def vocabulary(text: str) -> list[str]:
    """Distinct lower-case English words: those of a text with 4 to 12 letters, and the keys' words."""
    return sorted({*re.findall(r"\b[a-z]{4,12}\b", text), *ADJECTIVES, *NOUNS})


@dataclass(frozen=True)
class CommonWords:
    """Writes lists in which ten words stand 30 times and the others 3 times (6 and 1 below 4096 tokens).

    An answered example comes first: 40 words, 10 and 3 times (below 4096 tokens: 20 words, 3 times and once).

    Attributes:
        length: of the prompt and its answer, in tokens.
        words: that the lists are made of.
    """

    length: int
    words: Sequence[str]

    least = COMMON + 1

    @property
    def most(self) -> int:
        return len(self.words)

    def __call__(self, rng: random.Random, size: int, number: int) -> Prompt:
        short = self.length < SHORT
        example, common = self._list(rng, *((20, 3, 1) if short else (40, 10, 3)))
        asked, answers = self._list(rng, size, *((6, 1) if short else (30, 3)))
        text = (
            f"{COMMON_TEXT.format(context=example)}{COMMON_PREFIX} {numbered(common)}\n"
            f"{COMMON_TEXT.format(context=asked)}"
        )
        return Prompt(text, COMMON_PREFIX, tuple(answers))

    def _list(self, rng: random.Random, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        chosen = rng.sample(self.words, size)
        common = chosen[:COMMON]
        listed = common * often + chosen[COMMON:] * seldom
        rng.shuffle(listed)
        return numbered(listed), common


@dataclass(frozen=True)
class FrequentWords:
    """Writes texts of random words whose counts fall with the square of their rank.

    The most frequent one is shown as "..."; the next three are asked for.

    Attributes:
        room: tokens of the prompt; there is a word of the vocabulary for each 50.
    """

    room: int

    least = 60  # with fewer, counts of the ranks asked for are no longer different
    most = None

    def __call__(self, rng: random.Random, size: int, number: int) -> Prompt:
        names: dict[str, None] = {"...": None}
        while len(names) < max(5, self.room // TOKENS_A_WORD):
            names["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
        ranked = list(names)
        coded = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size * rank**-ALPHA / ZETA))]
        rng.shuffle(coded)
        return Prompt(FREQUENT_TEXT.format(context=" ".join(coded)), FREQUENT_PREFIX, tuple(ranked[1:4]))


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
