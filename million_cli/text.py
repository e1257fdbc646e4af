"""Calibration and test texts: shipped excerpts, local files, hub datasets, synthetic text.

Every text carries the hash of its content, so that no codebook is evaluated on its own calibration text.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from million_cli.errors import UserError
from million_cli.files import read_whole

EXCERPTS = Path(__file__).resolve().parent / "assets" / "text"
"""Folder of the shipped excerpts, with their attribution."""

SUFFIXES = (".txt", ".txt.xz", ".xz", ".md")
"""Endings of the files that are read from a folder."""

MAX_BYTES = 1 << 30
"""A text file may have this many bytes, unpacked: more is no calibration text but a mistake, or a bomb."""


@dataclass
class TextConfig:
    """Which text: `path` (a file or folder) if given, else `dataset` (a name in `DATASETS`).

    Attributes:
        dataset: name of a known text.
        split: train, validation or test (hub datasets only).
        path: a .txt or .xz file, or a folder of them (read in order of their names).
        max_chars: keep this many characters from the start; None keeps all.
        seed: seed of synthetic text.
    """

    dataset: str = "wikitext2-test-excerpt"
    split: str = "test"
    path: str | None = None
    max_chars: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """A text, its source, and the SHA-256 of its UTF-8 bytes."""

    content: str
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def load_text(config: TextConfig) -> Text:
    """The text that a configuration names.

    Raises:
        UserError: unknown name, missing or unreadable file, empty text, or the hub cannot be reached.
    """
    if config.max_chars is not None and config.max_chars < 1:
        raise UserError(f"max_chars={config.max_chars}: accepted are positive numbers and null")
    if config.path:
        source, content = str(config.path), read_path(Path(config.path))
    elif config.dataset in DATASETS:
        source, content = config.dataset, DATASETS[config.dataset](config)
        if config.dataset in HUB:
            source += f"/{config.split}"
    else:
        raise UserError(
            f"unknown dataset {config.dataset!r}; accepted: {', '.join(sorted(DATASETS))}, or a file by path="
        )
    content = content[: config.max_chars]
    if not content.strip():
        raise UserError(f"the text {source} is empty")
    return Text(content, source)


def read_path(path: Path) -> str:
    """A text file, plain or .xz, or all text files of a folder, joined by blank lines.

    Raises:
        UserError: no such file or folder, no text files in the folder, or the text is not UTF-8.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if not files:
            raise UserError(f"no text in folder {path}: looked for {', '.join(SUFFIXES)}")
        return "\n\n".join(read_path(file) for file in files)
    if not path.is_file():
        raise UserError(f"no such text file or folder: {path}")
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            return read_whole(file, str(path), MAX_BYTES).decode("utf-8")
    except (OSError, EOFError, MemoryError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error or type(error).__name__}") from error


def synthetic_text(seed: int, chars: int = 40_000) -> str:
    """Seeded random words with a Zipf vocabulary.

    A third of the sentences repeat earlier ones, so that long-range attention lowers the loss.
    """
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    shares = [1 / (rank + 2) for rank in range(len(letters))]
    words = ["".join(rng.choices(letters, shares, k=rng.randint(2, 9))) for _ in range(600)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    sentences: list[str] = []
    size = 0
    while size < chars:
        if sentences and rng.random() < 1 / 3:
            sentence = rng.choice(sentences)
        else:
            sentence = " ".join(rng.choices(words, weights, k=rng.randint(5, 14))).capitalize() + "."
        sentences.append(sentence)
        size += len(sentence) + 1
    return " ".join(sentences)[:chars]


def _excerpt(name: str) -> Callable[[TextConfig], str]:
    def read(config: TextConfig) -> str:
        return read_path(EXCERPTS / f"{name}.txt")

    return read


@dataclass(frozen=True)
class HubText:
    """A text on the hub: arguments of `datasets.load_dataset`, the column, and the string between rows."""

    path: str
    column: str
    joiner: str
    name: str | None = None
    data_files: str | None = None  # `{split}` is filled in


HUB: dict[str, HubText] = {
    # WikiText rows are lines that end in a newline; PTB rows are sentences without one.
    "wikitext2": HubText("Salesforce/wikitext", "text", "", name="wikitext-2-raw-v1"),
    "wikitext103": HubText("Salesforce/wikitext", "text", "", name="wikitext-103-raw-v1"),
    # The repository holds a loading script, which datasets no longer runs; the Parquet conversion works.
    "ptb": HubText(
        "parquet",
        "sentence",
        "\n",
        data_files="hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/"
        "penn_treebank/{split}/*.parquet",
    ),
}


def _from_hub(config: TextConfig) -> str:
    splits = ("train", "validation", "test")
    if config.split not in splits:
        raise UserError(f"unknown split {config.split!r} of {config.dataset}; accepted: {', '.join(splits)}")
    text = HUB[config.dataset]
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # our one line replaces the messages of its retries
    try:
        import datasets

        datasets.disable_progress_bars()
        if text.data_files:
            files = {config.split: text.data_files.format(split=config.split)}
            rows = datasets.load_dataset(text.path, data_files=files, split=config.split)
        else:
            rows = datasets.load_dataset(text.path, text.name, split=config.split)
    except Exception as error:  # the hub client raises a dozen types
        cause = " ".join(str(error).split())[:160]
        raise UserError(
            f"cannot load dataset {config.dataset} from the hub: {type(error).__name__}: {cause}; "
            "without a network name a local file by path="
        ) from error
    return text.joiner.join(rows[text.column])


DATASETS: dict[str, Callable[[TextConfig], str]] = {
    **{
        name: _excerpt(name)
        for name in ("wikitext2-test-excerpt", "wikitext2-valid-excerpt", "python-excerpt")
    },
    "synthetic": lambda config: synthetic_text(config.seed),
    **dict.fromkeys(HUB, _from_hub),
}
"""Name -> loader of each text without a path.  A new text needs an entry here and a file in conf/data."""
