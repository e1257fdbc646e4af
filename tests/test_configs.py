"""Every file under conf/ composes into a valid job."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest
from transformers import AutoConfig

from million_cli.cli import quote
from million_cli.conf import conf_folder
from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.pipelines.config import typed
from million_cli.registry import BENCHES, CACHES, CODECS, TASKS
from million_cli.text import DATASETS

GROUPS = ("model", "data", "sample", "train", "quantizer", "cache", "task", "bench", "experiment")
NEEDS = {"model=folder": ["model.path=/some/folder"], "data=file": ["data.path=/some/file.txt"]}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


FILES = [f"{group}={name}" for group in GROUPS for name in names(group)]


@pytest.mark.parametrize("value", ["../../x", "a/b", "a\\b", "..", ".hidden", "", "x\ny", "n" * 101])
@pytest.mark.parametrize("name", ["model.name", "quantizer.name"])
def test_names_of_files_never_leave_the_output_folder(name, value):
    with pytest.raises(UserError, match=rf"^{name}=.*: accepted are names of 1 to 100 printable characters"):
        compose([f"{name}={quote(value)}"])


def test_every_group_is_tested():
    found = {p.parent.relative_to(conf_folder()).as_posix() for p in conf_folder().rglob("*.yaml")}
    assert found == {".", *GROUPS, "hydra/job_logging", "hydra/hydra_logging"}


@pytest.mark.parametrize("choice", FILES)
def test_it_composes_into_a_job(choice):
    config = compose([choice, *NEEDS.get(choice, [])])
    for where, task in [("task", config.task), ("bench", config.bench), *config.also.items()]:
        typed(where, task)
    assert config.data.path or config.data.dataset in DATASETS
    group, _, name = choice.partition("=")
    if group in ("model", "quantizer"):
        assert getattr(config, group).name == name


@pytest.mark.parametrize("choice", list(NEEDS))
def test_a_path_that_must_be_given_is_asked_for(choice):
    if choice.startswith("model"):
        with pytest.raises(UserError, match=r"model\.path is empty"):
            compose([choice])
    else:
        assert compose([choice]).data.path is None  # refused when the text is loaded


@pytest.mark.parametrize("name", [n for n in names("model") if n.endswith(("shape", "random"))])
def test_shapes_are_transformers_configurations(name):
    shape = compose([f"model={name}"]).model.shape
    config = AutoConfig.for_model(**shape)
    assert all(getattr(config, key) == value for key, value in shape.items() if key != "rope_parameters")
    assert config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize(
    ("name", "bits"), [("million-paper", 4.0), ("pq-4bit", 4.0), ("pq-3bit", 3.0), ("pq-2bit", 2.0)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_quantizers_have_the_bits_in_their_names(name, bits, head_dim):
    quantizer = compose([f"quantizer={name}"]).quantizer
    spec = quantizer.spec(head_dim)
    assert spec.bits_per_element == bits
    assert quantizer.scope == ("merged" if name == "million-paper" else "head")
    assert quantizer.bits == (None if name == "million-paper" else bits)
    if name == "pq-3bit":
        assert (spec.keys.bits_per_element, spec.values.bits_per_element) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("task", "perplexity"),
        ("task", "passkey"),
        ("task", "ruler"),
        ("task", "lm_eval"),
        ("bench", "speed"),
        ("bench", "kernel"),
    ],
)
def test_the_files_spell_out_the_defaults_of_the_code(group, name):
    settings = getattr(compose([f"{group}={name}"]), group)
    config = (BENCHES if group == "bench" else TASKS).load(name).Config()
    assert set(settings) == set(asdict(config))
    assert typed(group, settings) == config


def test_every_name_has_a_file():
    assert set(TASKS.own) <= set(names("task"))
    assert set(BENCHES.own) <= set(names("bench"))
    assert set(CACHES.own) <= set(names("cache"))
    kinds = {compose([f"quantizer={name}"]).quantizer.kind for name in names("quantizer")}
    assert kinds == {"dense", "pq", *CODECS.own}


@pytest.mark.parametrize("name", names("quantizer"))
def test_files_of_codecs_spell_out_all_settings_so_that_overrides_of_them_compose(name):
    quantizer = compose([f"quantizer={name}"]).quantizer
    if quantizer.kind in CODECS.own:
        assert set(quantizer.codec) == {f.name for f in fields(CODECS.load(quantizer.kind).Config)}


def test_either_dense_choice_makes_a_dense_job():
    for choice in ("cache=dense", "quantizer=dense"):
        config = compose([choice])
        assert (config.cache.kind, config.quantizer.kind, config.quantizer.name) == (
            "dense",
            "dense",
            "dense",
        )


def test_the_smoke_experiment_needs_no_network():
    config = compose(["experiment=smoke"])
    datasets = {config.data.dataset, config.task["dataset"], config.also["passkey"]["dataset"]}
    assert config.model.path is None
    assert datasets == {"synthetic"}


def test_the_demo_does_not_judge_on_its_calibration_text():
    config = compose(["experiment=demo"])
    assert config.data.dataset == "wikitext2-valid-excerpt"
    assert config.task["dataset"] == "wikitext2-test-excerpt"
