"""The page by its structure: whole, self-contained, every figure with its table and origin."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

from million_cli.hydra_app import compose
from million_cli.pipelines.report import exhibits, report
from million_cli.report.sources import read
from million_cli.tables import write_table

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements by tag with their attributes; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.words.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_figure_has_its_words_table_and_origin(page):
    found = Page(page.read_text(encoding="utf-8"))
    images = found.all("img")
    assert len(images) == 12  # 2 of quality, 3 of scores, 3 of speed, one of every other kind
    assert all(len(image["alt"]) > 40 for image in images)
    assert len(found.all("figure")) == len(found.all("figcaption")) == len(images)
    sections = found.words["h2"]
    assert sections == [
        "Quality against bits",
        "Loss by position in the context",
        "Recall by depth and length",
        "Scores of tasks",
        "Speed against context",
        "Time of a decode step by stage",
        "Error of codebooks",
        "Jobs that did not finish",
        "All numbers",
        "Files",
    ]
    text = page.read_text(encoding="utf-8")
    assert text.count('class="origin"') == len(images) + 1  # and the failures'
    assert text.count("<code>million eval &lt;all&gt;</code>") >= 8
    assert "<code>f00d</code>" in text
    assert "scripts/gpu_suite.sh" in text


def test_the_page_needs_nothing_else_and_nothing_in_it_is_markup_by_mistake(page):
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    for tag, attributes in found.elements:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/svg+xml;base64,", "#"))
    assert "url(" not in text
    assert "@import" not in text
    assert "<bad>" not in text
    assert "ValueError: &lt;bad&gt; luck" in text
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in found.all("a")} <= set(ids)
    for image in found.all("img"):
        svg = base64.b64decode(image["src"].partition(",")[2])
        assert b"<svg" in svg
        assert b"http://" not in svg.replace(b"http://www.w3.org/", b"").replace(
            b"http://purl.org/", b""
        ).replace(b"http://creativecommons.org/", b"")
    assert len(text) < 1 << 20


def test_each_figure_is_a_png_beside_the_page_with_its_numbers(page):
    names = {path.stem for path in page.parent.glob("*.png")}
    assert len(names) == 12
    for name in names:
        data = (page.parent / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") >= 600  # pixels wide
        assert (page.parent / f"{name}.csv").read_text().count("\n") >= 2


def test_the_numbers_beside_the_page_make_the_same_figures_again(page, folder):
    first = {e.name: e for e in exhibits(read([folder], "all"), []) if e.paint is not None}
    files = [page.parent / f"{name}.csv" for name in first]
    again = {e.name: e for e in exhibits(read(files, "all"), [])}
    kept = {
        name
        for name in first
        if name.split("-")[0]
        in ("recall", "positions", "ruler", "longbench", "lm", "breakdown", "speed", "quality")
    }
    assert len(kept) == 10
    for name in kept:
        assert again[name].table == first[name].table, name
        assert again[name].origin.commits == first[name].origin.commits


def test_figures_of_one_name_are_kept_apart(tmp_path):
    for model in ("a b", "a-b"):
        cell = {"model": model, "length": 1, "depth": 0.5, "recall": 1.0, "recall_dense": 1.0}
        write_table(tmp_path / f"{model}.csv", [cell], "passkey")
    report(compose([f"report.files=[{tmp_path}]", f"out={tmp_path}/out"]))
    names = {path.name for path in (tmp_path / "out" / "report").glob("*.png")}
    assert names == {"recall-a-b.png", "recall-a-b-2.png"}
