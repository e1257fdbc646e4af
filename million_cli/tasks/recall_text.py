"""Key-value recall in natural text: the format that training and evaluation share.  No tensors here.

Facts ("The password of Alice is river.") stand between the sentences of a filler text; the prompt ends with
a question whose next word is the answer.  One fact is the passkey test (by depth and length); several facts
with one of them asked is multi-key recall.  Any tokenizer serves: the caller's `count_tokens` measures.

    filler = Filler(text, lambda s: len(tokenizer.encode(s, add_special_tokens=False)))
    item = recall_prompt(filler, length=1024, seed=0, depth=0.25, facts=8)
    correct = is_correct(generate(item.prompt), item)
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from million_cli.errors import UserError

# Each name and word, preceded by a space, is one token of the reference model's tokenizer: a model of 5M
# parameters can carry one token from a fact to its answer, and hardly a sequence of them.
_NAMES = """
    Adam Alan Albert Alice Andrew Anna Arthur Barbara Benjamin Carl Catherine Charles Charlotte Clara
    Daniel David Diana Edward Elizabeth Emily Emma Eric Eva Florence Francis Frank Frederick George Grace
    Hannah Harold Harry Helen Henry Hugo Isaac Jack Jacob James Jane John Joseph Julia Karen Laura Leo
    Louis Lucy Margaret Maria Mark Martin Mary Michael Nancy Oliver Oscar Paul Peter Rachel Richard
    Robert Rose Samuel Sarah Simon Sophia Stephen Susan Thomas Victor Walter William
"""
_WORDS = """
    anchor animal apple arrow autumn basket bell bird blanket blood board boat bone book bottle branch
    bread bridge brush bucket butter button candle carpet castle chain chair cheese cherry circle clock
    cloud coat coffee copper corn cotton cousin crown desert diamond dinner doctor door dream drum eagle
    earth engine family farmer feather field finger fire fish flag flower forest garden glass gold grass
    guitar hammer harbor heart honey horse hotel house iron island jacket kettle kitchen ladder lamp
    leather lemon letter library lion machine market metal milk mirror money monkey moon morning mountain
    music needle night ocean office orange paper pencil pepper piano picture pilot planet plate pocket
    poem potato prince queen rabbit rain ribbon river rocket salt school shadow ship shoe silver snow
    soldier song spider spring star stone storm street sugar summer sword table teacher temple tiger
    tower train tree valley village violin wagon water wheat wheel window winter wolf wood
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())
WORDS: tuple[str, ...] = tuple(_WORDS.split())

FACT = " The password of {name} is {word}."
QUESTION = " Question: what is the password of {name}? Answer: the password of {name} is"
ANSWER = " {word}"

_SLACK = 8  # tokens that a prompt may fall short before it is built anew,
_ATTEMPTS = 8  # and how often
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")
_WORD_START = re.compile(r"(?=\s)")


@dataclass(frozen=True)
class Fact:
    """One stated pair; `depth` is the share of the filler's tokens before it (1: next to the question)."""

    name: str
    word: str
    depth: float

    @property
    def text(self) -> str:
        return FACT.format(name=self.name, word=self.word)


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt and the answer that must follow it.

    `answer` begins with the space that separates it from the prompt; `facts` are all facts in the order of
    the text, `asked` is the one in question; `tokens` is the prompt's length, without special tokens.
    """

    prompt: str
    answer: str
    asked: Fact
    facts: tuple[Fact, ...]
    tokens: int


class Filler:
    """A text cut into sentences, each measured once in tokens.

    Args:
        text: natural text; its sentences end with ``.``, ``!`` or ``?`` before white space.
        count_tokens: number of tokens of a string, without special tokens.

    Raises:
        UserError: the text is blank.
    """

    def __init__(self, text: str, count_tokens: Callable[[str], int]) -> None:
        if not text.strip():
            raise UserError("filler text is empty: recall needs natural text of at least one sentence")
        # White space belongs to the sentence after it, so sentences and facts join in any order.
        self.sentences = [s for s in _SENTENCE_END.split(" " + text.strip()) if s.strip()]
        self.count_tokens = count_tokens
        self.tokens = [count_tokens(s) for s in self.sentences]

    def passage(self, end: int, budget: int) -> list[str]:
        """The sentences before index `end` (cyclic: a short text repeats) that fill `budget` tokens.

        The first one is cut at a word, as a text seen through a window is: at most a word is missing.
        """
        pieces: list[str] = []
        while self.tokens[end % len(self.tokens)] <= budget:
            budget -= self.tokens[end % len(self.tokens)]
            pieces.append(self.sentences[end % len(self.tokens)])
            end -= 1
        tail = ""
        for word in reversed(_WORD_START.split(self.sentences[end % len(self.tokens)])):
            if self.count_tokens(word + tail) > budget:
                break
            tail = word + tail
        if tail.strip():
            pieces.append(tail)
        return pieces[::-1]


def recall_prompt(
    filler: Filler, length: int, seed: int | str, *, depth: float | None = None, facts: int = 1
) -> RecallPrompt:
    """A prompt of at most `length` tokens that states `facts` facts and asks for one.

    Deterministic in its arguments; `depth` moves the asked fact and changes nothing else.

    Args:
        filler: the text between the facts.
        length: tokens of the whole prompt, question included, special tokens excluded; the prompt is shorter
            by less than a word, or by some 8 tokens if the lengths of its parts do not add up to its own.
        seed: draws the names, words, depths and the passage.
        depth: where the asked fact stands, in 0..1, moved to the nearest end of a sentence (None: at random).
            The other facts stand at random depths.
        facts: number of facts, of distinct names and words.

    Raises:
        UserError: `facts`, `depth` or `length` is out of range.
    """
    if not 1 <= facts <= len(NAMES):
        raise UserError(f"facts={facts}: accepted are 1 to {len(NAMES)}")
    if depth is not None and not 0 <= depth <= 1:
        raise UserError(f"depth={depth}: accepted are 0 (start) to 1 (just before the question)")
    rng = random.Random(f"recall/{seed}")
    pairs = list(zip(rng.sample(NAMES, facts), rng.sample(WORDS, facts), strict=True))
    depths = [rng.random() for _ in pairs]
    if depth is not None:
        depths[0] = depth
    end = rng.randrange(len(filler.sentences))
    question = QUESTION.format(name=pairs[0][0])
    fixed = filler.count_tokens(question) + sum(filler.count_tokens(Fact(*p, 0.0).text) for p in pairs)

    budget = length - fixed
    best: RecallPrompt | None = None
    for _ in range(_ATTEMPTS):
        pieces = filler.passage(end, budget) if budget > 0 else []
        if not pieces:
            break
        item = _assemble(filler, pieces, pairs, depths, question)
        # Where the parts' lengths do not add up (a space put before each string), correct the budget.
        missing = length - item.tokens
        if missing >= 0 and (best is None or item.tokens > best.tokens):
            best = item
        if 0 <= missing <= _SLACK:
            break
        budget += missing
    if best is None:
        raise UserError(
            f"length={length}: facts={facts} and the question take {fixed} tokens, and some text must fit"
        )
    return best


def _assemble(
    filler: Filler,
    pieces: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    depths: Sequence[float],
    question: str,
) -> RecallPrompt:
    """Put each fact after the piece whose end is nearest to its depth; the first pair is asked."""
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + filler.count_tokens(piece))
    placed: list[tuple[int, Fact]] = []
    for (name, word), wanted in zip(pairs, depths, strict=True):
        # Never before the first piece: the prompt begins with text.
        at = min(range(1, len(ends)), key=lambda i: abs(ends[i] - wanted * ends[-1]))
        placed.append((at, Fact(name, word, ends[at] / ends[-1])))
    asked = placed[0][1]
    placed.sort(key=lambda item: item[0])
    text = "".join(
        piece + "".join(fact.text for at, fact in placed if at == i)
        for i, piece in enumerate(pieces, start=1)
    )
    prompt = (text + question).lstrip()
    return RecallPrompt(
        prompt=prompt,
        answer=ANSWER.format(word=asked.word),
        asked=asked,
        facts=tuple(fact for _, fact in placed),
        tokens=filler.count_tokens(prompt),
    )


def recall_grid(
    filler: Filler,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    *,
    facts: int = 1,
    seed: int = 0,
) -> Iterator[tuple[int, float, RecallPrompt]]:
    """(length, depth, prompt) for every cell, `samples` prompts each.

    Sample i of one length is the same prompt at every depth but for the asked fact's place, so cells compare.
    """
    for length in lengths:
        for depth in depths:
            for i in range(samples):
                item = recall_prompt(filler, length, f"{seed}/{length}/{i}", depth=depth, facts=facts)
                yield length, depth, item


def is_correct(completion: str, item: RecallPrompt) -> bool:
    """Whether the first word of the model's continuation is the answer (case and punctuation aside)."""
    first = re.match(r"\W*(\w+)", completion)
    return first is not None and first.group(1).lower() == item.answer.strip().lower()
