"""The harness's task without the harness: its configuration and its refusals."""

from __future__ import annotations

import importlib.util

import pytest

from million_cli.errors import UserError
from million_cli.hydra_app import compose, harness_task
from million_cli.tasks.lm_eval import Config, load


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs lm_eval, accelerate; pip install 'million\[lm-eval\]' has them"
    ):
        load(Config(tasks=["gsm8k"]))


def test_a_task_must_be_named():
    with pytest.raises(UserError, match=r"task\.tasks is empty: name a task .* task=lm_eval/gsm8k"):
        load(Config())


@pytest.mark.parametrize(
    "settings", [{"limit": 0}, {"num_fewshot": -1}, {"batch": 0}, {"max_length": 1}, {"prefill": "none"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=f"task.{next(iter(settings))}"):
        Config(**settings)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("task=perplexity", ["task=perplexity"]),
        ("out=lm_eval/x", ["out=lm_eval/x"]),
        ("task=lm_eval/gsm8k", ["task=lm_eval", "task.tasks=['gsm8k']"]),
        ("task=lm_eval/a,lm_eval/b-c", ["task=lm_eval", "task.tasks=['a'],['b-c']"]),
        ("+task@also.math=lm_eval/gsm8k", ["+task@also.math=lm_eval", "also.math.tasks=['gsm8k']"]),
    ],
)
def test_a_task_of_the_harness_is_named_on_the_command_line(override, parts):
    assert harness_task(override) == parts


def test_it_composes():
    config = compose(["task=lm_eval/gsm8k", "task.limit=10", "+task@also.two=lm_eval/ifeval"])
    assert config.task["name"] == "lm_eval"
    assert (config.task["tasks"], config.task["limit"]) == (["gsm8k"], 10)
    assert config.also["two"]["tasks"] == ["ifeval"]


def test_a_sweep_over_the_harness_and_others_is_refused():
    with pytest.raises(UserError, match="a sweep has either tasks of the harness"):
        harness_task("task=perplexity,lm_eval/gsm8k")
