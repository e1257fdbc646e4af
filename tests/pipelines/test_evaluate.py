"""Evaluation: three caches, results found again, refusals, fallbacks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_fixtures import SHAPE

from million_cli.errors import UserError
from million_cli.hf.models import random_model
from million_cli.hf.switch import use_pq_attention
from million_cli.hydra_app import compose
from million_cli.pipelines import evaluate as pipeline
from million_cli.pipelines.evaluate import run_evaluate
from million_cli.pipelines.session import Session, byte_tokenizer
from million_cli.pipelines.train_codebook import train
from million_cli.tasks import perplexity


def metrics(config):
    (result,) = run_evaluate(config)
    return dict(result.metrics)


def test_paged_equals_contiguous_and_dense_is_exact(job):
    found = {
        kind: metrics(job(f"cache={kind}", "cache.page_size=16", "cache.extended_residual=32"))
        for kind in ("dense", "contiguous", "paged")
    }
    assert found["dense"]["kl_e3"] == 0
    assert found["contiguous"]["kl_e3"] > 0
    for name in ("kl_e3", "perplexity", "top1_agreement", "code_bytes"):
        assert found["paged"][name] == found["contiguous"][name]
    for found_there in found.values():
        assert found_there["perplexity_dense"] == found["dense"]["perplexity"]
    assert found["contiguous"]["bits_nominal"] == 1.5
    assert found["dense"]["cache_ratio"] == 2.0  # float32
    assert "codebook_file" not in found["dense"]


def test_folding_changes_the_figures_by_rounding_only(job):
    plain, folded = metrics(job()), metrics(job("fold=true"))
    assert "reused_from" not in folded
    assert folded["kl_e3"] == pytest.approx(plain["kl_e3"], rel=1e-3)
    assert folded["perplexity_dense"] == pytest.approx(plain["perplexity_dense"], rel=1e-5)
    assert folded["codebook_file"] == plain["codebook_file"]
    assert folded["codebook_bytes"] < plain["codebook_bytes"]  # without the values' maps


def test_a_result_is_found_again_and_says_so(job, tmp_path, monkeypatch):
    config = job(f"out={tmp_path}")
    first = metrics(config)
    monkeypatch.setattr(perplexity, "measure", None)
    again = metrics(config)
    assert again.pop("reused_from")
    assert again == first


def test_nothing_is_found_again_without_reuse(job, tmp_path, monkeypatch):
    config = job(f"out={tmp_path}", "reuse=false")
    metrics(config)
    calls, original = [], perplexity.measure
    monkeypatch.setattr(perplexity, "measure", lambda *given: calls.append(given) or original(*given))
    metrics(config)
    assert len(calls) == 1


def test_further_tasks_join_the_record(job):
    with_recall = job(
        "+task@also.recall=passkey",
        "also.recall.dataset=synthetic",
        "also.recall.seed=2",
        "also.recall.lengths=[160]",
        "also.recall.depths=[0.5]",
        "also.recall.samples=2",
    )
    found, alone = metrics(with_recall), metrics(job())
    assert found["recall_n"] == 2
    assert all(found[name] == value for name, value in alone.items() if name != "reused_from")
    with open(found["passkey_table"]) as handle:
        assert [(row["length"], row["depth"]) for row in csv.DictReader(handle)] == [("160", "0.5")]


def test_the_calibration_text_is_refused_unless_allowed(job):
    same = ["task.seed=1", "task.max_chars=3000"]
    with pytest.raises(UserError, match=r"calibrated on the text under evaluation \(synthetic\)"):
        run_evaluate(job(*same))
    assert metrics(job(*same, "allow_same_text=true"))["tokens"] > 0


def test_a_part_of_the_calibration_text_is_refused_too(job):
    with pytest.raises(UserError, match="calibrated on the text under evaluation"):
        run_evaluate(job("task.seed=1", "task.max_chars=2000"))


def test_a_codebook_file_is_held_to_its_own_text(job):
    path = train(Session(job()))
    assert metrics(job(f"codebook={path}"))["codebook_file"] == str(path)
    with pytest.raises(UserError, match="calibrated on the text"):
        run_evaluate(job(f"codebook={path}", "data.seed=9", "task.seed=1", "task.max_chars=3000"))


def test_a_codebook_of_another_model_is_refused(job):
    path = train(Session(job()))
    with pytest.raises(UserError, match=r"belongs to another model .*weights"):
        run_evaluate(job(f"codebook={path}", "seed=1"))
    with pytest.raises(UserError, match=r"num_layers: 2 != 3"):
        run_evaluate(job(f"codebook={path}", "model.shape.num_hidden_layers=3"))
    with pytest.raises(UserError, match="no such file"):
        run_evaluate(job("codebook=/nowhere.safetensors"))


def test_a_full_pool_falls_back_to_the_same_numbers_and_is_named(job):
    paged = ["cache=paged", "cache.page_size=16", "cache.extended_residual=32"]
    (result,) = run_evaluate(job(*paged, "cache.max_pages=3"))
    assert len(result.fallbacks) == 1
    assert "contiguous" in result.fallbacks[0]
    assert result.metrics["kl_e3"] == metrics(job(*paged))["kl_e3"]
    with pytest.raises(UserError, match="strict"):
        run_evaluate(job(*paged, "cache.max_pages=3", "strict=true"))


def test_mistakes_show_before_anything_slow(job, monkeypatch):
    monkeypatch.setattr(pipeline, "Caches", None)
    for overrides, message in (
        (["task.name=chess"], "task.name=chess: accepted are perplexity, passkey"),
        (["+task.contxt=3"], "unknown key task.contxt; accepted are dataset"),
        (["task.batch=many"], "task.batch: Value 'many'"),
        (["task.mode=fast"], "task.mode=fast: accepted are parallel, step, distort"),
        (["task.path=/nowhere.txt"], "no such text file or folder: /nowhere.txt"),
        (["task.dataset=chess"], "unknown dataset 'chess'; accepted"),
    ):
        with pytest.raises(UserError, match="^" + message):
            run_evaluate(job(*overrides))


def test_records_hold_configuration_device_and_dtype(job):
    (result,) = run_evaluate(job("model.dtype=float64"))
    assert (result.device, result.dtype) == ("cpu", "float64")
    assert result.config["model"]["dtype"] == "float64"
    (dense,) = run_evaluate(job("cache=dense"))
    assert dense.config["quantizer"]["name"] == "dense"


def model_folder(folder):
    """A random model with its tokenizer, saved."""
    random_model(SHAPE, seed=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda c: c["rope_parameters"].update(rope_theta=500.0)),
        ("config.json", lambda c: c.update(rms_norm_eps=0.1)),
        ("generation_config.json", lambda c: c.update(eos_token_id=[3, 4])),
        ("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
        ("tokenizer_config.json", lambda c: c.update(chat_template="{{ messages[0]['content'] }}")),
    ],
    ids=["rope_theta", "eps", "generation", "tokenizer", "chat template"],
)
def test_all_that_a_figure_depends_on_is_in_its_key(job, tmp_path, file, change):
    folder = model_folder(tmp_path / "model")
    config = job("model=folder", f"model.path={folder}", f"out={tmp_path}", "cache=dense")
    before = Session(config).identity
    assert Session(config).identity == before
    assert "reused_from" not in metrics(config)
    assert "reused_from" in metrics(config)
    edit(folder / file, change)
    assert Session(config).identity != before
    assert "reused_from" not in metrics(config)


def test_the_key_does_not_depend_on_what_was_done_with_the_model(job):
    session = Session(job())
    before = session.identity
    use_pq_attention(session.model)
    session.tokenizer.padding_side = "left"
    session.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    del session.identity
    assert session.identity == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "task",
    [
        ["task.dataset=synthetic", "task.context=64"],
        ["task=passkey", "task.dataset=synthetic", "task.lengths=[160]", "task.samples=1"],
    ],
    ids=["perplexity", "passkey"],
)
def test_logits_that_are_not_finite_are_refused(tmp_path, value, task):
    folder = model_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = compose(["model=folder", f"model.path={folder}", f"out={tmp_path}", "cache=dense", *task])
    with pytest.raises(UserError, match="the logits hold NaN or infinity"):
        run_evaluate(config)
    assert not list((tmp_path / "evaluations").glob("*.json"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"measured": "now"}', '{"metrics": []}', "[" * 100_000]
)
def test_a_damaged_result_is_measured_again_with_a_line(job, tmp_path, caplog, content):
    config = job(f"out={tmp_path}", "task.max_tokens=256")
    first = metrics(config)
    (kept,) = (tmp_path / "evaluations").glob("perplexity-*.json")
    kept.write_text(content)
    again = metrics(config)
    assert again == first
    assert f"{kept} is damaged; measured again" in caplog.text
    assert metrics(config)["reused_from"]


def test_a_table_that_is_gone_is_made_again(job, tmp_path, caplog):
    config = job(f"out={tmp_path}", "task.max_tokens=256", "task.buckets=2")
    first = metrics(config)
    table = Path(first["positions_table"])
    content = table.read_text()
    table.unlink()
    assert metrics(config) == first
    assert f"{table} is gone; measured again" in caplog.text
    assert table.read_text() == content


@pytest.mark.parametrize("mode", ["parallel", "distort"])
def test_a_row_says_that_positions_are_not_covered(job, mode):
    """Windows of 128 tokens, read with a codebook of windows of 64."""
    settings = ["sample.context=64", "sample.long_share=0", "reuse=false", f"task.mode={mode}"]
    (as_it_lies,) = run_evaluate(job(*settings, "quantizer.positions=0"))
    assert [str(one) for one in as_it_lies.fallbacks] == [
        "codes for every position -> codes for the first 64: the text goes on beyond those that the codebook "
        "was calibrated for, where its errors are larger"
    ]
    assert as_it_lies.metrics["codebook_positions"] == 64
    (in_blocks,) = run_evaluate(job(*settings, "quantizer.rebase=64"))
    assert in_blocks.fallbacks == []
    assert in_blocks.metrics["codebook_positions"] == "any"
