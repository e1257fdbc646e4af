"""The 21 datasets of LongBench (Bai et al., 2023, arXiv:2308.14508): prompts and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from million_cli.tasks.longbench import metrics
from million_cli.tasks.longbench.metrics import Metric
from million_cli.tasks.longbench.prompts import PROMPTS


@dataclass(frozen=True)
class Dataset:
    """One dataset, as published.

    Attributes:
        category: of the six task categories.
        metric: score of one prediction against one answer, 0 to 1.
        new_tokens: generated at most.
        chat: asked through the model's chat template, if it has one; few-shot and code prompts never are.
        first_line: only the first line of a prediction is judged.
        stop_at_newline: generation ends at a newline (after at least one token).
        prompt: template, with fields of a sample.
    """

    category: str
    metric: Metric
    new_tokens: int
    chat: bool
    first_line: bool
    stop_at_newline: bool
    prompt: str

    def score(self, prediction: str, answers: list[str], classes: list[str]) -> float:
        """The best of the prediction's scores against each answer, 0 to 1.

        Args:
            prediction: as generated.
            answers: any of them is right.
            classes: of a classification dataset, all there are; otherwise unused.
        """
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return max(self.metric(prediction, answer, classes) for answer in answers)


_TABLE: dict[str, tuple[str, Metric, int]] = {
    "narrativeqa": ("single-document QA", metrics.qa_f1, 128),
    "qasper": ("single-document QA", metrics.qa_f1, 128),
    "multifieldqa_en": ("single-document QA", metrics.qa_f1, 64),
    "multifieldqa_zh": ("single-document QA", metrics.qa_f1_zh, 64),
    "hotpotqa": ("multi-document QA", metrics.qa_f1, 32),
    "2wikimqa": ("multi-document QA", metrics.qa_f1, 32),
    "musique": ("multi-document QA", metrics.qa_f1, 32),
    "dureader": ("multi-document QA", metrics.rouge_zh, 128),
    "gov_report": ("summarization", metrics.rouge, 512),
    "qmsum": ("summarization", metrics.rouge, 512),
    "multi_news": ("summarization", metrics.rouge, 512),
    "vcsum": ("summarization", metrics.rouge_zh, 512),
    "trec": ("few-shot learning", metrics.classification, 64),
    "triviaqa": ("few-shot learning", metrics.qa_f1, 32),
    "samsum": ("few-shot learning", metrics.rouge, 128),
    "lsht": ("few-shot learning", metrics.classification, 64),
    "passage_count": ("synthetic", metrics.count, 32),
    "passage_retrieval_en": ("synthetic", metrics.retrieval, 32),
    "passage_retrieval_zh": ("synthetic", metrics.retrieval_zh, 32),
    "lcc": ("code completion", metrics.code_similarity, 64),
    "repobench-p": ("code completion", metrics.code_similarity, 64),
}

DATASETS = {
    name: Dataset(
        category=category,
        metric=metric,
        new_tokens=new_tokens,
        chat=category not in ("few-shot learning", "code completion"),
        first_line=category == "few-shot learning",
        stop_at_newline=name == "samsum",
        prompt=PROMPTS[name],
    )
    for name, (category, metric, new_tokens) in _TABLE.items()
}
"""Name -> dataset, in the published order."""
