"""The page: every exhibit's picture, table and origin in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from million_cli.files import write_text
from million_cli.report import style
from million_cli.report.exhibit import Exhibit, Grid, slug
from million_cli.results import git_commit, now, version
from million_cli.tables import write_table

TITLE = "Quantized KV caches: what they cost and what they give"


def write(
    folder: Path, exhibits: Sequence[Exhibit], files: Sequence[tuple[str, str, int]], command: str
) -> Path:
    """Write `index.html` and, beside it, a PNG and a CSV of each exhibit.

    Args:
        files: (name, kind, number of rows) of each file that was read.

    Returns:
        The page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    _name_apart(exhibits)
    for exhibit in exhibits:
        if exhibit.paint is not None and style.available():
            figure = style.draw(exhibit.paint, *exhibit.size)
            style.save_png(figure, folder / f"{exhibit.name}.png")
            exhibit.image = style.svg_uri(figure)
        write_table(folder / f"{exhibit.name}.csv", exhibit.data, exhibit.kind)
    path = folder / "index.html"
    write_text(path, render(exhibits, files, command))
    return path


def render(exhibits: Sequence[Exhibit], files: Sequence[tuple[str, str, int]], command: str) -> str:
    """The page as text."""
    sections: dict[str, list[Exhibit]] = {}
    for exhibit in exhibits:
        sections.setdefault(exhibit.section, []).append(exhibit)
    environment = Environment(
        loader=PackageLoader("million_cli", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=TITLE,
        made=now().replace("T", " ").removesuffix("+00:00") + " UTC",
        version=version("million"),
        commit=git_commit(),
        command=command,
        sections=[
            {"id": slug(title), "title": title, "exhibits": group} for title, group in sections.items()
        ],
        details=[exhibit for exhibit in exhibits if exhibit.details is not None],
        files=Grid(
            ["file", "holds", "rows"],
            [[name, kind, str(rows) if rows else ""] for name, kind, rows in files],
            [False, False, True],
        ),
    )


def _name_apart(exhibits: Sequence[Exhibit]) -> None:
    """Number the exhibits whose names are equal."""
    seen: dict[str, int] = {}
    for exhibit in exhibits:
        seen[exhibit.name] = seen.get(exhibit.name, 0) + 1
        if seen[exhibit.name] > 1:
            exhibit.name += f"-{seen[exhibit.name]}"
