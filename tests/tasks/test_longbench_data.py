"""LongBench's samples from zips and folders, and damaged ones."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from contextlib import suppress

import pytest

from million_cli.errors import UserError
from million_cli.tasks.longbench import data
from million_cli.tasks.longbench.task import Config, load

ROW = {"input": "q", "context": "c", "answers": ["a"], "all_classes": None, "_id": "x1", "length": 3}
TREC = {**ROW, "all_classes": ["a", "b"], "_id": None}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data/qasper.jsonl", lines(ROW, {**ROW, "_id": "x2", "answers": ["一", "b"]}))
        file.writestr("data/qasper_e.jsonl", lines({**ROW, "_id": "not this"}))
        file.writestr("data/trec.jsonl", lines(TREC) + "\n")
    return path


def test_a_zip_and_both_kinds_of_folder_hold_the_same(archive, tmp_path):
    zipfile.ZipFile(archive).extractall(tmp_path / "out")
    read = [data.read(str(p), ["qasper", "trec"]) for p in (archive, tmp_path / "out", tmp_path / "out/data")]
    assert read[0].datasets == read[1].datasets == read[2].datasets
    assert len({samples.sha256 for samples in read}) == 1
    assert [s.id for s in read[0].datasets["qasper"]] == ["x1", "x2"]
    assert read[0].datasets["qasper"][1].answers == ["一", "b"]
    assert read[0].datasets["trec"][0] == data.Sample("1", "q", "c", ["a"], ["a", "b"])  # no id: its line


def test_datasets_and_samples_are_selected(archive):
    samples = load(Config(path=str(archive), tasks=["trec", "qasper", "trec"], samples=1))
    assert {name: len(found) for name, found in samples.datasets.items()} == {"trec": 1, "qasper": 1}
    both = load(Config(path=str(archive), tasks=["trec", "qasper"]))
    assert samples.sha256 != both.sha256
    assert samples.source == str(archive)


def test_the_hub_file_is_used_without_a_path(archive, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((*args, kwargs))
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    samples = load(Config(tasks=["qasper"]))
    assert asked == [("THUDM/LongBench", "data.zip", {"repo_type": "dataset"})]
    assert len(samples.datasets["qasper"]) == 2
    assert samples.source == "THUDM/LongBench/data.zip"


def test_an_unreachable_hub_names_the_alternative(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match=r"cannot load .* OSError: no network; .* task\.path=") as caught:
        load(Config())
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(archive, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jieba" else find(name))
    with pytest.raises(UserError, match=r"needs jieba; pip install 'million\[longbench\]'"):
        load(Config(path=str(archive)))


def test_missing_datasets_are_named(archive):
    with pytest.raises(UserError, match=r"has no narrativeqa, .*accepted are a data\.zip.*task\.tasks="):
        load(Config(path=str(archive)))
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; accepted are a data\.zip"):
        data.read("nowhere", ["qasper"])


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    path = tmp_path / "data.zip"
    path.write_text("not a zip")
    with pytest.raises(UserError, match="not a readable zip"):
        data.read(str(path), ["qasper"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "trec.jsonl is empty"),
        ("\n\n", "trec.jsonl is empty"),
        (lines(TREC) + "{", r"trec\.jsonl:2: not a line of JSON"),
        ("[1]\n", r"trec\.jsonl:1: accepted are objects with texts"),
        (lines({**TREC, "context": None}), "accepted are objects with texts"),
        (lines({**TREC, "answers": []}), "accepted are objects with texts"),
        (lines({**TREC, "answers": [1]}), "accepted are objects with texts"),
        (lines({**TREC, "all_classes": None}), "list of class names as `all_classes`, not None"),
    ],
)
def test_damaged_lines_are_named(tmp_path, content, message):
    (tmp_path / "trec.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        data.read(str(tmp_path), ["trec"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["qasper", "squad"]}, r"task\.tasks=squad: accepted are narrativeqa, qasper, "),
        ({"tasks": []}, r"task\.tasks=\[\]: accepted are some of"),
        ({"samples": 0}, r"task\.samples=0: accepted are integers from 1"),
        ({"max_length": 1}, r"task\.max_length=1: accepted are integers from 2"),
        ({"new_tokens": 0}, r"task\.new_tokens=0"),
        ({"batch": 0}, r"task\.batch=0"),
        ({"prefill": "distort"}, r"task\.prefill=distort: accepted are quantized, exact"),
    ],
)
def test_mistakes_in_the_configuration_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_a_packed_dataset_has_a_limit_whatever_the_archive_says(archive, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 50)
    with pytest.raises(UserError, match=r"data\.zip: data/qasper\.jsonl holds more than"):
        data.read(str(archive), ["qasper"])


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_of_any_packing_is_one_line(tmp_path, packing):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("qasper.jsonl", lines(*[ROW] * 50))
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with suppress(UserError):  # and no other error; some bytes do no harm
            data.read(str(path), ["qasper"])


def test_deep_json_and_half_characters_are_refused_by_line(tmp_path):
    for row, message in (
        ("[" * 100_000, "not a line of JSON"),
        ('{"input": "\\ud800", "context": "c", "answers": ["a"]}', "accepted are objects with texts"),
    ):
        (tmp_path / "qasper.jsonl").write_text(lines(ROW) + row + "\n")
        with pytest.raises(UserError, match=rf"qasper\.jsonl:2: {message}"):
            data.read(str(tmp_path), ["qasper"])
