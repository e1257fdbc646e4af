"""Texts by name and by path."""

from __future__ import annotations

import hashlib
import lzma
import sys
from types import SimpleNamespace

import pytest

from million_cli import text
from million_cli.errors import UserError
from million_cli.text import DATASETS, TextConfig, load_text, read_path, synthetic_text


def test_plain_and_compressed_files_are_the_same_text(tmp_path):
    content = "Grüße — a line\r\nand another\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content.encode()))
    texts = [load_text(TextConfig(path=str(tmp_path / name))) for name in ("a.txt", "a.txt.xz")]
    assert texts[0].content == texts[1].content == content
    assert texts[0].sha256 == texts[1].sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert texts[1].source == str(tmp_path / "a.txt.xz")


def test_a_folder_is_read_in_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt.xz").write_bytes(lzma.compress(b"third"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read_path(tmp_path) == "first\n\nsecond\n\nthird"


def test_max_chars_keeps_the_start(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    assert load_text(TextConfig(path=str(tmp_path / "a.txt"), max_chars=4)).content == "0123"


def test_bad_texts_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "bad.xz").write_bytes(b"not xz")
    (tmp_path / "folder").mkdir()
    for config, message in (
        (TextConfig(path=str(tmp_path / "nowhere.txt")), "no such text file or folder"),
        (TextConfig(path=str(tmp_path / "empty.txt")), "is empty"),
        (TextConfig(path=str(tmp_path / "latin.txt")), "as UTF-8 text"),
        (TextConfig(path=str(tmp_path / "bad.xz")), "cannot read"),
        (TextConfig(path=str(tmp_path / "folder")), "no text in folder"),
        (TextConfig(dataset="wikitext3"), "unknown dataset 'wikitext3'; accepted: ptb, "),
        (TextConfig(dataset="wikitext2", split="dev"), "accepted: train, validation, test"),
        (TextConfig(dataset="synthetic", max_chars=0), "max_chars=0"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_text(config)
        assert "\n" not in str(error.value)


def test_synthetic_text_is_seeded():
    assert synthetic_text(3) == synthetic_text(3)
    assert synthetic_text(3) != synthetic_text(4)
    assert len(synthetic_text(0, 1234)) == 1234
    sentences = synthetic_text(0).split(". ")
    assert len(set(sentences)) < 0.8 * len(sentences)  # it repeats itself


def test_the_shipped_excerpts_differ():
    test, valid = (load_text(TextConfig(dataset=f"wikitext2-{split}-excerpt")) for split in ("test", "valid"))
    assert 200_000 < len(test.content) < 400_000
    assert 200_000 < len(valid.content) < 400_000
    assert test.sha256 != valid.sha256


@pytest.fixture
def hub(monkeypatch):
    """The hub, answering with the rows and remembering what was asked."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"text": [" = T = \n", "", " a b \n"], "sentence": ["a b", "c d"]}

    fake = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def test_hub_texts_are_joined_as_their_rows_want(hub):
    wikitext = load_text(TextConfig(dataset="wikitext103", split="validation"))
    assert (wikitext.content, wikitext.source) == (" = T = \n a b \n", "wikitext103/validation")
    assert hub[0] == (("Salesforce/wikitext", "wikitext-103-raw-v1"), {"split": "validation"})
    assert load_text(TextConfig(dataset="ptb")).content == "a b\nc d"
    assert hub[1][1]["data_files"]["test"].endswith("/penn_treebank/test/*.parquet")


def test_without_a_network_the_way_out_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    fake = SimpleNamespace(load_dataset=fail, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(
        UserError, match="Couldn't reach the hub; without a network name a local file by path="
    ):
        load_text(TextConfig(dataset="wikitext2"))


def test_every_known_name_is_listed():
    assert set(DATASETS) == {
        "wikitext2-test-excerpt",
        "wikitext2-valid-excerpt",
        "python-excerpt",
        "synthetic",
        "wikitext2",
        "wikitext103",
        "ptb",
    }


def test_packed_texts_have_a_limit_and_damaged_ones_a_line(tmp_path, monkeypatch):
    packed = lzma.compress(b"many words " * 1000)
    (tmp_path / "a.txt.xz").write_bytes(packed)
    assert len(read_path(tmp_path / "a.txt.xz")) == 11_000
    monkeypatch.setattr(text, "MAX_BYTES", 10_999)
    with pytest.raises(UserError, match=r"a\.txt\.xz holds more than"):
        read_path(tmp_path / "a.txt.xz")
    (tmp_path / "plain.txt").write_bytes(bytes(11_000))
    with pytest.raises(UserError, match=r"plain\.txt holds more than"):
        read_path(tmp_path / "plain.txt")
    for damaged in (packed[:-5], packed[:20], packed[:30] + b"x" + packed[31:], b"", b"no xz"):
        (tmp_path / "a.txt.xz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read .*a\.txt\.xz as UTF-8 text: .+") as error:
            read_path(tmp_path / "a.txt.xz")
        assert "\n" not in str(error.value)
