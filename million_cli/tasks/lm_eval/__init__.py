"""Generation tasks of lm-evaluation-harness, answered with the cache under test and with the dense one.

task.py    `Config`, `load`, `measure`
model.py   the harness's transformers model, given a cache for every batch
"""

from million_cli.tasks.lm_eval.task import Config, load, measure

__all__ = ["Config", "load", "measure"]
