"""Given overrides are obeyed, or refused in one line with the choice that contradicts them."""

from __future__ import annotations

import pytest

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.pipelines.given import parse, refuse_unread, take_from_codebook
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train


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


@pytest.fixture
def codebook(job):
    """A codebook with codes of 3 bits for two dimensions."""
    return str(train(Session(job("quantizer.name=pq-mine"))))


def test_a_row_says_how_its_codebook_was_trained(codebook):
    config = compose([f"codebook={codebook}", "train.encoder=torch"])
    assert (config.quantizer.name, config.quantizer.bits) == ("pq-4bit", 4.0)
    take_from_codebook(config, ["train.encoder=torch"])
    assert (config.quantizer.name, config.quantizer.kind, config.quantizer.bits) == ("pq-mine", "pq", None)
    assert config.quantizer.keys.nbits == 3
    assert config.sample.tokens == 2048
    assert config.train.iterations == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantizer.scope=head"],
        ["quantizer.bits=null", "quantizer.keys.nbits=3", "quantizer.values.nbits=3"],
    ],
)
def test_what_agrees_with_the_codebook_is_accepted(codebook, overrides):
    take_from_codebook(compose([f"codebook={codebook}", *overrides]), overrides)


@pytest.mark.parametrize(
    ("override", "trained"),
    [
        ("quantizer=pq-2bit", "quantizer=pq-mine"),
        ("quantizer.keys.nbits=8", "quantizer.keys.nbits=3"),
        ("quantizer.bits=3", "quantizer.bits=null"),
        ("quantizer.keys.dsub=4", "quantizer.keys.dsub=2"),
        ("quantizer.scope=merged", "quantizer.scope=head"),
        ("quantizer.name=pq-4bit", "quantizer.name=pq-mine"),
    ],
)
def test_what_contradicts_the_codebook_is_refused(codebook, override, trained):
    overrides = [override, *(["quantizer.bits=null"] if "scope" in override else [])]
    config = compose([f"codebook={codebook}", *overrides])
    with pytest.raises(UserError) as caught:
        take_from_codebook(config, [override])
    assert str(caught.value) == f"{override}: codebook={codebook} was trained with {trained}"
