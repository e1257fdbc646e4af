"""RULER (Hsieh et al. 2024, arXiv 2404.06654): thirteen synthetic tasks at any length.

`definitions` lists the tasks; `niah`, `tracing`, `aggregation` and `qa` write their prompts; `fitting` makes
them as long as a length allows; `task` asks and scores.
"""

from million_cli.tasks.ruler.task import RESUMABLE, Config, load, measure

__all__ = ["RESUMABLE", "Config", "load", "measure"]
