"""Keys of finished work."""

from __future__ import annotations

import threading

import pytest

from million_cli.errors import UserError
from million_cli.pipelines import stages
from million_cli.pipelines.stages import code_digest, locked, stage_key


def test_a_key_depends_on_every_value_and_not_on_the_order():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": None}
    assert stage_key(base) == stage_key({"b": None, "a": {"y": [1, 2], "x": 1}})
    for other in ({**base, "b": 0}, {**base, "a": {"x": 1, "y": [2, 1]}}, {**base, "c": None}):
        assert stage_key(other) != stage_key(base)


def test_the_code_digest_changes_with_the_sources(tmp_path, monkeypatch):
    (tmp_path / "pq").mkdir()
    (tmp_path / "pq" / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    monkeypatch.setattr(stages, "PACKAGE", tmp_path)
    digests = []
    for text in ("1", "2"):
        (tmp_path / "pq" / "a.py").write_text(text)
        code_digest.cache_clear()
        digests.append([code_digest(*parts)["code"] for parts in (["pq"], [""], ["pq", "b.py"])])
    (tmp_path / "b.py").write_text("2")
    code_digest.cache_clear()
    digests.append([code_digest(*parts)["code"] for parts in (["pq"], [""], ["pq", "b.py"])])
    code_digest.cache_clear()
    part, whole, with_file = zip(*digests, strict=True)
    assert part[0] != part[1] == part[2]
    assert len(set(whole)) == len(set(with_file)) == 3


def test_a_stage_is_made_by_one_at_a_time(tmp_path):
    inside, overlaps = [], []

    def work():
        with locked(tmp_path / "stages" / "x"):
            overlaps.append(len(inside))
            inside.append(1)
            threading.Event().wait(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [0, 0, 0, 0]


def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file" / "x"):
        pass
