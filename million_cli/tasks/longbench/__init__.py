"""LongBench: 21 datasets of long prompts, answered with the cache under test and with the dense one.

prompts.py    the published templates
datasets.py   what is asked in each dataset and how it is judged
metrics.py    the published metrics
data.py       samples from the hub, a zip or a folder
prompting.py  a sample as token ids: template, middle truncation, chat template
task.py       `Config`, `load`, `measure`
"""

from million_cli.tasks.longbench.task import Config, load, measure

RESUMABLE = True
"""`measure` takes `journals`."""

__all__ = ["RESUMABLE", "Config", "load", "measure"]
