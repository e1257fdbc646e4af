"""The rows of a journal after crashes and with several writers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.errors import UserError
from million_cli.journal import Journal


def test_rows_are_found_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    journal = Journal(path)
    assert "a" not in journal
    journal.add({"a": "one\ntwo", "b": {"text": "数"}})
    journal.add({"a": "later"})
    for kept in (journal, Journal(path)):
        assert (kept["a"], kept["b"], len(kept)) == ("later", {"text": "数"}, 2)
    assert "a" not in Journal(path, fresh=True)


@given(st.dictionaries(st.text(max_size=3), st.text(max_size=5), min_size=1, max_size=4), st.data())
def test_a_crash_while_writing_costs_only_what_was_not_written(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("journal") / "answers.jsonl"
    Journal(path).add({"first": 1})
    whole = path.stat().st_size
    Journal(path).add(rows)
    cut = data.draw(st.integers(whole, path.stat().st_size))
    path.write_bytes(path.read_bytes()[:cut])
    found = Journal(path)
    kept = [key for key in rows if key in found]
    assert kept == list(rows)[: len(kept)]
    found.add({"last": 2})
    again = Journal(path)
    assert {key: again[key] for key in ("first", *kept, "last")} == {
        "first": 1,
        **{key: rows[key] for key in kept},
        "last": 2,
    }
    assert len(again) == len(kept) + 2


def test_two_writers_keep_both(tmp_path):
    path = tmp_path / "answers.jsonl"
    one, two = Journal(path), Journal(path)
    one.add({"a": 1})
    two.add({"b": 2})
    assert "b" not in one
    assert [Journal(path)[key] for key in "ab"] == [1, 2]


def test_without_a_path_it_is_in_memory():
    journal = Journal()
    journal.add({"a": 1})
    assert journal["a"] == 1


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/answers\.jsonl"):
        Journal(tmp_path / "file" / "answers.jsonl").add({"a": 1})
