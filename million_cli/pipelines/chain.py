"""`million run`: chosen stages in one job."""

from __future__ import annotations

from copy import deepcopy

from million_cli.pipelines import Result
from million_cli.pipelines.bench import bench
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import CacheConfig, JobConfig, QuantizerConfig
from million_cli.pipelines.evaluate import evaluate, prepare
from million_cli.pipelines.sample import run_sample
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import run_train


def run_chain(config: JobConfig) -> list[Result]:
    """Run `config.stages` in their natural order; each result becomes a record.

    `baseline` evaluates the dense cache as a record of its own.  `sample` and `train` make a record only when
    nothing after them does, since evaluation and timing do what they need of them by themselves.
    """
    stages = set(config.stages)
    results: list[Result] = []
    if "baseline" in stages:
        dense = deepcopy(config)
        dense.quantizer, dense.cache = QuantizerConfig.dense(), CacheConfig(kind="dense")
        session = Session(dense)
        results.append(evaluate(session, prepare(session), Caches(session)))
    if stages & {"evaluate", "bench"}:
        session = Session(config)
        jobs = prepare(session) if "evaluate" in stages else []
        caches = Caches(session)
        if jobs:
            results.append(evaluate(session, jobs, caches))
        if "bench" in stages:
            results.append(bench(session, caches))
    elif "train" in stages:
        results += run_train(config)
    elif "sample" in stages:
        results += run_sample(config)
    return results
