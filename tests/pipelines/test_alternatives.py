"""Alternatives to product quantization through the pipeline."""

from __future__ import annotations

import pytest

from million_cli.codecs import Shape
from million_cli.conf import conf_folder
from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.pipelines.config import checked
from million_cli.pipelines.evaluate import run_evaluate
from million_cli.registry import CODECS

BITS = {
    "fp8": 8.0,
    "hadamard-int4": 4.25,
    "kivi-int2-g32": 3.0,
    "kivi-int2-g64": 2.5,
    "kivi-int4-g32": 5.0,
    "kivi-int4-g64": 4.5,
}
OPTIONAL = {"quanto-int4", "hqq-int4"}


def test_each_configuration_has_the_bits_it_says():
    found = {}
    for path in (conf_folder() / "quantizer").glob("*.yaml"):
        config = compose([f"quantizer={path.stem}"])
        quantizer = config.quantizer
        if quantizer.kind in CODECS.names and path.stem not in OPTIONAL:
            codec_class = CODECS.load(quantizer.kind)
            settings = checked("quantizer.codec", codec_class.Config, quantizer.codec)
            found[path.stem] = codec_class(settings, Shape(128, config.cache.page_size), 0).bits
    assert found == BITS


def test_each_is_measured_by_itself_and_found_again(job, tmp_path):
    """The cached evaluations of quantizers without a codebook must not be taken for one another."""
    settings = {"kivi-int2-g32": ["quantizer.codec.group=16"]}
    results = {
        name: run_evaluate(job(f"out={tmp_path}", f"quantizer={name}", *settings.get(name, [])))[0].metrics
        for name in ("fp8", "kivi-int2-g32", "fp8", "dense")
    }
    again = run_evaluate(job(f"out={tmp_path}", "quantizer=kivi-int2-g32", "quantizer.codec.group=16"))[
        0
    ].metrics
    assert results["dense"]["kl_e3"] == 0 < results["fp8"]["kl_e3"] < results["kivi-int2-g32"]["kl_e3"]
    assert (results["fp8"]["bits_nominal"], results["kivi-int2-g32"]["bits_nominal"]) == (8.0, 4.0)
    assert again["reused_from"]
    assert again["kl_e3"] == results["kivi-int2-g32"]["kl_e3"]


def test_without_a_window_they_are_not_measured(job):
    with pytest.raises(UserError, match="mode=distort: accepted for pq quantizers, not for fp8"):
        run_evaluate(job("quantizer=fp8", "task.mode=distort"))
