"""Another package adds a codec and a task by entry points, and runs them from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest
from small_job import SMALL_JOB

from million_cli.errors import UserError
from million_cli.registry import CODECS, TASKS, Registry
from million_cli.tables import read_results, records

CODEC = '''
from dataclasses import dataclass

from million_cli.errors import UserError


@dataclass
class Settings:
    nbits: int = 8

    def __post_init__(self):
        if not 2 <= self.nbits <= 8:
            raise UserError(f"quantizer.codec.nbits={self.nbits}: accepted are 2 to 8")


class LayerScale:
    """Integers times one scale a layer, the largest element of its samples."""

    Config = Settings

    def __init__(self, config, shape, seed, scales=None):
        self.config, self.shape, self.seed, self.scales = config, shape, seed, scales

    @property
    def bits(self):
        return float(self.config.nbits)

    def calibrate(self, keys, values):
        assert len(keys) == len(values) == self.shape.num_layers
        scales = [(keys[i].abs().max(), values[i].abs().max()) for i in range(len(keys))]
        return [LayerScale(self.config, self.shape, self.seed, pair) for pair in scales]

    def _through(self, pages, largest):
        step = largest.to(pages) / (2 ** (self.config.nbits - 1) - 1)
        return (pages.clamp(-largest, largest) / step).round() * step

    def keys(self, pages):
        return self._through(pages, self.scales[0])

    def values(self, pages):
        return self._through(pages, self.scales[1])
'''
TASK = '''
from dataclasses import dataclass

import torch

from million_cli.tasks.base import TaskResult, dense_cache


@dataclass
class Config:
    name: str = "logit-error"
    tokens: int = 64


@torch.no_grad()
def measure(model, tokenizer, caches, text, config, seed):
    """Largest difference of logits from the dense cache's."""
    ids = torch.randint(250, (1, config.tokens), generator=torch.Generator().manual_seed(seed))
    found, exact = (model(ids, past_key_values=c).logits for c in (caches("quantized"), dense_cache(model)))
    return TaskResult({"logit_error": float((found - exact).abs().max()), "tokens": config.tokens})
'''
ENTRY_POINTS = """
[million.codecs]
layer-scale = example_codecs.scale:LayerScale

[million.tasks]
logit-error = example_codecs.logits
"""
ROOT = Path(__file__).resolve().parent.parent
TASK_CHOICES = sorted([*(path.stem for path in (ROOT / "conf" / "task").glob("*.yaml")), "logit-error"])
BASE = [choice for choice in SMALL_JOB if not choice.startswith(("quantizer", "task"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package installed in it, as an installer leaves it."""
    folder = tmp_path_factory.mktemp("site")
    package, metadata = folder / "example_codecs", folder / "example_codecs-1.2.dist-info"
    package.mkdir(), metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "scale.py").write_text(CODEC)
    (package / "logits.py").write_text(TASK)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: example-codecs\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(dedent(ENTRY_POINTS))
    return folder


@pytest.fixture(scope="module")
def million(site, tmp_path_factory):
    """Run a command line in a process that has the package: (exit code, lines of stderr)."""
    out = tmp_path_factory.mktemp("out")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "TQDM_DISABLE": "1"}

    def run(*arguments: str) -> tuple[int, list[str], list[dict[str, str]]]:
        done = subprocess.run(
            [sys.executable, "-m", "million_cli", *arguments, f"out={out}"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
        table = out / "results.csv"
        return (
            done.returncode,
            done.stderr.splitlines(),
            records(read_results(table)) if table.exists() else [],
        )

    return run


def test_a_codec_and_a_task_run_from_the_command_line(million):
    chosen = [*BASE, "quantizer=layer-scale", "task=logit-error", "task.tokens=300"]
    code, stderr, rows = million("eval", *chosen, "--multirun", "quantizer.codec.nbits=8,2")
    assert code == 0, stderr
    fine, coarse = rows[-2:]
    assert (fine["status"], fine["config.quantizer.kind"]) == ("ok", "layer-scale")
    assert (fine["config.task.name"], fine["tokens"]) == ("logit-error", "300")
    assert (fine["config.quantizer.codec.nbits"], coarse["config.quantizer.codec.nbits"]) == ("8", "2")
    assert 0 < 10 * float(fine["logit_error"]) < float(coarse["logit_error"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("quantizer.codec.nbits=9", "quantizer.codec.nbits=9: accepted are 2 to 8"),
        ("+quantizer.codec.group=4", "unknown key quantizer.codec.group; accepted are nbits"),
        ("+task.context=4", "unknown key task.context; accepted are name, tokens"),
        ("task=logits", f"task=logits: accepted are {', '.join(TASK_CHOICES)}"),
    ],
)
def test_mistakes_end_in_one_line(million, choice, message):
    code, stderr, _ = million("eval", *BASE, "quantizer=layer-scale", "task=logit-error", choice)
    assert code == 2
    assert message in stderr[-1]
    assert not any("Traceback" in line for line in stderr)


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    for registry in (CODECS, TASKS):
        registry.__dict__.pop("added", None)
    yield
    for registry in (CODECS, TASKS):
        registry.__dict__.pop("added", None)


def test_results_depend_on_the_sources_of_the_package(installed, site):
    before = CODECS.source("layer-scale")
    assert "example-codecs 1.2" in before["quantizer.kind=layer-scale"]
    assert CODECS.source("fp8") == {}
    (site / "example_codecs" / "more.py").write_text("x = 1\n")
    assert CODECS.source("layer-scale") != before


def test_doctor_names_the_package(installed):
    from million_cli.doctor import names

    found = dict(names())
    assert found["codecs"].endswith("hqq, layer-scale (example-codecs)")
    assert found["tasks"].endswith("logit-error (example-codecs)")


def test_a_name_that_two_packages_have_is_refused():
    registry = Registry("task.name", {"ours": "json"}, "million.tasks")
    registry.__dict__["added"] = {
        name: [EntryPoint(name, value, registry.group) for value in values]
        for name, values in {"ours": ["a"], "theirs": ["b", "c"], "gone": ["no_such_module"]}.items()
    }
    with pytest.raises(UserError, match=r"task\.name=ours: several packages have it.*: million, a"):
        registry.load("ours")
    with pytest.raises(UserError, match=r"task\.name=theirs: several packages have it.*: b, c"):
        registry.check("theirs")
    with pytest.raises(UserError, match=r"task\.name=gone: no_such_module cannot be imported"):
        registry.load("gone")
    with pytest.raises(UserError, match=r"task\.name=other: accepted are ours, theirs, gone"):
        registry.load("other")
