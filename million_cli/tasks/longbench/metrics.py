"""LongBench's metrics: score(prediction, answer, classes), 0 to 1.

These follow the published definitions, oddities included, so that scores compare with published ones; a
comment names each oddity.  The libraries (rouge, jieba, rapidfuzz) are imported on use.
"""

from __future__ import annotations

import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Metric = Callable[[str, str, Sequence[str]], float]
"""(prediction, answer, classes) -> 0 to 1; only `classification` reads the classes."""

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"
    "〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""As published: `《` is not in it."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of words, after SQuAD's normalisation (case, punctuation, articles)."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of jieba's words, without punctuation and case."""
    return _f1(_words_zh(prediction), _words_zh(answer))


def rouge(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of summary-level ROUGE-L, as the package `rouge` computes it; 0 if either side has no sentence.

    That package recurses once a word, and the published code scores 0 where Python's recursion limit stops
    it; here it may go as deep as it needs.
    """
    from rouge import Rouge

    depth = len(prediction.split()) + len(answer.split())
    try:
        with _recursion(depth):
            found = Rouge(metrics=["rouge-l"]).get_scores(prediction, answer)
    except ValueError:  # what it raises for nothing to compare
        return 0.0
    return float(found[0]["rouge-l"]["f"])


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`rouge` on jieba's words."""
    return rouge(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / (classes named in the prediction) if the answer is among them, else 0.

    A class whose name is part of the answer's does not count, except one right behind (in the order of
    `classes`, among those named) another that was not counted: the published loop skips it.
    """
    named: list[str] = []
    dropped = False
    for name in classes:
        if name not in prediction:
            continue
        dropped = not dropped and name != answer and name in answer
        if not dropped:
            named.append(name)
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the number of the answer, `Paragraph <number>`."""
    return _share_of_numbers(prediction, re.search(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the number of the answer, `段落<number>`."""
    return _share_of_numbers(prediction, re.search(r"段落(\d+)", answer))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the answer."""
    return _share_of_numbers(prediction, re.search(r"(.*)", answer))


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the answer and the first line without a backquote, `#` or `//`, to a whole percent.

    (characters of both - insertions and deletions between them) / characters of both.  This is `fuzz.ratio`
    of fuzzywuzzy with python-Levenshtein, the edit similarity that the paper names.  Without that package
    fuzzywuzzy falls back to difflib's matching blocks, which are fewer at times ("ababab" and "aaaaab": 67 %
    here, 33 % there); published scores do not say which they used.
    """
    from rapidfuzz.distance import Indel

    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    total = len(line) + len(answer)
    if not total:
        return 1.0
    return round(100 * ((total - Indel.distance(line, answer)) / total)) / 100


def _words(text: str) -> list[str]:
    text = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _words_zh(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_ALL_PUNCTUATION).split()) for word in _cut(text))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it tells how it loads its dictionary
    return list(jieba.cut(text, cut_all=False))


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def _share_of_numbers(prediction: str, right: re.Match[str] | None) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(right[1]) / len(numbers) if numbers and right else 0.0


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Let Python recurse `depth` calls deeper than it may by itself."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
