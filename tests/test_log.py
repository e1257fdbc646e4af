"""The log: dated entries with attempt, result and decision, and a page that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LOG = Path(__file__).resolve().parent.parent / "results" / "log"
ENTRIES = sorted(path for path in LOG.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_is_dated_and_says_what_came_of_it(path):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.md", path.name)
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# .+\n\n{path.name[:10]}\b", text)
    assert re.findall(r"^- \*\*(\w+):\*\*", text, re.MULTILINE)[:3] == ["Tried", "Result", "Decision"]


def test_the_page_lists_every_entry_newest_first_and_its_figures_exist():
    text = (LOG / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\d{4}[^)]*\.md)\)", text)
    assert sorted(listed) == [path.name for path in ENTRIES]
    assert [name[:10] for name in listed] == sorted((name[:10] for name in listed), reverse=True)
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert figures
    assert all((LOG / figure).is_file() for figure in figures)
