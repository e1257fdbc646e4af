"""Variable tracking: a chain of assignments in noise; name all variables that have its value."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from million_cli.tasks.ruler.fitting import fitted
from million_cli.tasks.ruler.niah import NOISE
from million_cli.tasks.ruler.prompt import Prompt

HOPS = 4
EXAMPLE_TOKENS = 500
TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)


@dataclass(frozen=True)
class Tracing:
    """Writes prompts with one chain of `HOPS` hops, after one answered example.

    The example, with variables of three letters instead of five, takes at most 500 tokens as published, and
    at most a quarter of the length.

    Attributes:
        length: of the prompt and its answer, in tokens.
        count: tokens of a text.
    """

    length: int
    count: Callable[[str], int]

    least = HOPS + 1
    most = None

    @cached_property
    def example_lines(self) -> int:
        def tokens(size: int) -> int:
            text, prefix, _ = self._ask(random.Random(0), size, letters=3)
            return self.count(text + prefix)

        return fitted(tokens, min(EXAMPLE_TOKENS, self.length // 4), self.least) or self.least

    def __call__(self, rng: random.Random, size: int, number: int) -> Prompt:
        text, prefix, names = self._ask(rng, self.example_lines, letters=3)
        example = f"{text}{prefix} {' '.join(names)}\n"
        text, prefix, names = self._ask(rng, size, letters=5)
        return Prompt(f"{example}\n{text}", prefix, tuple(names))

    def _ask(self, rng: random.Random, size: int, letters: int) -> tuple[str, str, list[str]]:
        names: dict[str, None] = {}
        while len(names) <= HOPS:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        chain = list(names)
        value = rng.randint(10_000, 99_998)
        lines = [NOISE] * size
        assignments = [f"VAR {chain[0]} = {value}"]
        assignments += [f"VAR {name} = VAR {before} " for before, name in pairwise(chain)]
        for done, place in enumerate(sorted(rng.sample(range(size), len(assignments)))):
            lines.insert(place + done, assignments[done])
        text = TEXT.format(context="\n".join(lines), value=value)
        return text, PREFIX.format(count=len(chain), value=value), chain
