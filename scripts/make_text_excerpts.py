"""Make the shipped texts: whole articles from the start of a WikiText split, and this package's own sources.

python scripts/make_text_excerpts.py articles test.txt.xz million_cli/assets/text/wikitext2-test-excerpt.txt
python scripts/make_text_excerpts.py sources million_cli million_cli/assets/text/python-excerpt.txt
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
from pathlib import Path
from typing import Annotated

import typer

# An article's title stands alone on its line between single equals signs: " = Robert Boulter = ".
_TITLE = re.compile(r"^ = [^=\n](?:[^\n]*[^=\n])? = *$", re.MULTILINE)


def whole_articles(text: str, limit_bytes: int) -> str:
    """The longest run of whole articles from the start of `text` within `limit_bytes` of UTF-8."""
    starts = [match.start() for match in _TITLE.finditer(text)]
    starts = [*starts[1:], len(text)]
    fitting = [start for start in starts if len(text[:start].encode()) <= limit_bytes]
    if not fitting:
        needed = len(text[: starts[0]].encode())
        raise typer.BadParameter(f"--limit-bytes {limit_bytes}: the first article takes {needed} bytes")
    return text[: fitting[-1]]


app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0] if __doc__ else None)


@app.command()
def articles(
    source: Annotated[Path, typer.Argument(help="a WikiText split, .txt or .txt.xz", exists=True)],
    target: Annotated[Path, typer.Argument(help="file to write")],
    limit_bytes: Annotated[int, typer.Option(help="size not to exceed")] = 300_000,
) -> None:
    """Write the articles from the start of SOURCE that fit into LIMIT_BYTES to TARGET."""
    opener = lzma.open if source.suffix == ".xz" else open
    with opener(source, "rt", encoding="utf-8", newline="") as file:
        excerpt = whole_articles(file.read(), limit_bytes)
    write(excerpt, target)


@app.command()
def sources(
    folder: Annotated[Path, typer.Argument(help="a folder with Python files", exists=True)],
    target: Annotated[Path, typer.Argument(help="file to write")],
    limit_bytes: Annotated[int, typer.Option(help="size not to exceed")] = 200_000,
) -> None:
    """Write whole Python files of FOLDER, ordered by hash, that fit into LIMIT_BYTES to TARGET."""
    files = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    excerpt = ""
    for text in sorted(files, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len((excerpt + text).encode()) <= limit_bytes:
            excerpt += text
    write(excerpt, target)


def write(excerpt: str, target: Path) -> None:
    temporary = target.with_suffix(".part")
    temporary.write_text(excerpt, encoding="utf-8", newline="")
    os.replace(temporary, target)
    typer.echo(f"{target}: {len(excerpt.encode()):,} bytes, {len(excerpt.split()):,} words")


if __name__ == "__main__":
    app()
