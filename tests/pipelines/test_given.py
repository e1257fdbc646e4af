"""Given overrides are obeyed, or refused in one line with the choice that contradicts them."""

from __future__ import annotations

import pytest

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.pipelines.given import parse, refuse_unread


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer=fp8", "quantizer.keys.nbits=3"], "quantizer.keys.nbits=3: quantizer=fp8 is of kind fp8"),
        (["quantizer=kivi-int4-g64", "quantizer.bits=3"], "quantizer.bits=3: quantizer=kivi-int4-g64 is of"),
        (["quantizer=fp8", "cache=paged"], "cache=paged: the cache of quantizer=fp8 is simulated"),
        (["quantizer=fp8", "codebook=x"], "codebook=x: quantizer=fp8 has no codebook"),
        (["quantizer=fp8", "fold=true"], "fold=true: quantizer=fp8 has no rotation"),
        (["quantizer=fp8", "sample.tokens=9"], "sample.tokens=9: quantizer=fp8 is not calibrated"),
        (["cache=dense", "cache.page_size=32"], "cache.page_size=32: cache=dense quantizes nothing"),
        (["cache=dense", "quantizer=pq-2bit"], "quantizer=pq-2bit: cache=dense quantizes nothing"),
        (["cache=dense", "codebook=x"], "codebook=x: cache=dense quantizes nothing"),
        (["quantizer=dense", "cache=paged"], "cache=paged: quantizer=dense quantizes nothing"),
        (["quantizer=dense", "train.iterations=3"], "train.iterations=3: quantizer=dense quantizes nothing"),
        (["cache.max_pages=9"], "cache.max_pages=9: cache=contiguous has no pool of pages"),
        (["codebook=x", "train.iterations=3"], "train.iterations=3: codebook=x is trained already"),
        (["codebook=x", "data=ptb"], "data=ptb: codebook=x is trained already"),
        (["cache=paged", "cache=contiguous"], "cache=contiguous: cache=paged is given too"),
    ],
)
def test_a_contradiction_is_refused(overrides, message):
    config = compose(overrides)
    with pytest.raises(UserError) as caught:
        refuse_unread(config, overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cache=dense", "quantizer=dense"],
        ["cache=dense", "task.context=128", "seed=2"],
        ["cache=paged", "cache.max_pages=9", "quantizer.bits=3", "fold=true"],
        ["quantizer=fp8", "cache.page_size=32", "cache=contiguous"],
        ["quantizer=kivi-int2-g32", "quantizer.codec.nbits=3"],
        ["codebook=x", "cache.page_size=32", "task=passkey"],
        ["seed=3", "seed=3"],
    ],
)
def test_the_rest_is_obeyed(overrides):
    refuse_unread(compose(overrides), overrides)


def test_a_sweep_says_what_its_dense_job_does_not_read(caplog):
    overrides = ["cache=dense", "quantizer=pq-4bit", "cache.page_size=32"]
    refuse_unread(compose(overrides), overrides, sweep=True)
    assert [record.message for record in caplog.records] == [
        "not read: quantizer=pq-4bit: cache=dense quantizes nothing",
        "not read: cache.page_size=32: cache=dense quantizes nothing",
    ]


def test_overrides_are_read_as_hydra_reads_them():
    given = parse(["a=1", "+b.c=x=y", "++d='e,f'", "~g", "+task@also.x=passkey"])
    assert given == {"a": "1", "b.c": "x=y", "d": "'e,f'"}
