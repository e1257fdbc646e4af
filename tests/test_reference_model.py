"""The shipped model holds what its card states, and its training script trains."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import million_cli
from million_cli.tasks.recall_text import NAMES, WORDS, Filler, RecallPrompt, recall_prompt

ASSETS = Path(million_cli.__file__).parent / "assets"
FOLDER = ASSETS / "reference-model"
TEXT = ASSETS / "text"
SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("train_reference_model")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


# --- the model


def test_shape_and_size(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 64)
    assert config.max_position_embeddings == 4096
    assert config.tie_word_embeddings
    assert 5.0e6 <= sum(p.numel() for p in model.parameters()) <= 5.5e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000


def test_weights_are_half_precision() -> None:
    assert AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto").dtype == torch.float16


def test_recall_words_are_single_tokens(tokenizer: Any) -> None:
    ids = [tokenizer.encode(f" {word}") for word in NAMES + WORDS]
    assert {len(i) for i in ids} == {1}
    assert len({i[0] for i in ids}) == len(ids)


def test_tokenizer_keeps_text(tokenizer: Any) -> None:
    text = (TEXT / "wikitext2-valid-excerpt.txt").read_text(encoding="utf-8")[
        :20_000
    ] + " naïve 数据 🙂\n\n\t end"
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_perplexity(model: Any, tokenizer: Any) -> None:
    """84.49 on these tokens when it was shipped; the bound leaves room for other kernels only."""
    text = (TEXT / "wikitext2-test-excerpt.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(tokenizer.encode(text)[:4096]).view(4, 1024)
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss) < 84.49 * 1.005


def recalled(model: Any, tokenizer: Any, items: list[RecallPrompt]) -> float:
    """Share of the items whose answer is the most likely next token, in left-padded batches."""
    correct = 0
    for first in range(0, len(items), 8):
        group = items[first : first + 8]
        rows = tokenizer(
            [item.prompt for item in group], padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**rows, logits_to_keep=1, use_cache=False).logits[:, -1]
        words = tokenizer.batch_decode(logits.argmax(-1, keepdim=True))
        correct += sum(word == item.answer for word, item in zip(words, group, strict=True))
    return correct / len(items)


@pytest.mark.parametrize("facts", [1, 8])
def test_recalls_at_1k_tokens(model: Any, tokenizer: Any, facts: int) -> None:
    text = (TEXT / "wikitext2-test-excerpt.txt").read_text(encoding="utf-8")
    filler = Filler(text, lambda s: len(tokenizer.encode(s)))
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    items = [recall_prompt(filler, 1024, i, depth=depths[i % 5], facts=facts) for i in range(20)]
    assert all(1016 <= item.tokens <= 1024 for item in items)
    assert recalled(model, tokenizer, items) >= 0.95


def test_recall_needs_the_fact(model: Any, tokenizer: Any) -> None:
    """Without its sentence the answer is not found, so recall is read from the context and not guessed."""
    text = (TEXT / "wikitext2-test-excerpt.txt").read_text(encoding="utf-8")
    filler = Filler(text, lambda s: len(tokenizer.encode(s)))
    items = [recall_prompt(filler, 256, i, facts=4) for i in range(24)]
    assert recalled(model, tokenizer, items) >= 0.95
    blind = [
        RecallPrompt(i.prompt.replace(i.asked.text, ""), i.answer, i.asked, i.facts, i.tokens) for i in items
    ]
    assert recalled(model, tokenizer, blind) <= 0.1


def test_log_is_the_shipped_training(script: ModuleType) -> None:
    with (FOLDER / "training_log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    hyper = script.Hyper()
    assert int(rows[-1]["tokens"]) == int(rows[-1]["step"]) * hyper.batch * hyper.sequence
    losses = [float(row["validation_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert all(float(v) >= 0.95 for k, v in rows[-1].items() if k.startswith("recall_"))


# --- the texts


@pytest.mark.parametrize("split", ["test", "valid"])
def test_excerpts_are_whole_articles(split: str) -> None:
    raw = (TEXT / f"wikitext2-{split}-excerpt.txt").read_bytes()
    assert 250_000 <= len(raw) <= 300_000
    text = raw.decode("utf-8")
    assert text.startswith(" \n = ")
    assert text.endswith(" \n")
    assert " @-@ " in text


def test_excerpts_share_no_article() -> None:
    def long_lines(split: str) -> set[str]:
        text = (TEXT / f"wikitext2-{split}-excerpt.txt").read_text(encoding="utf-8")
        return {line for line in text.splitlines() if len(line) > 100}

    assert not long_lines("test") & long_lines("valid")


def test_make_text_excerpts_cuts_between_articles(tmp_path: Path) -> None:
    excerpts = load_script("make_text_excerpts")
    article = " \n = {} = \n \n Text of it . \n \n = = Part = = \n \n More . \n "
    text = "".join(article.format(title) for title in ("One", "Two long", "Three"))
    two = "".join(article.format(title) for title in ("One", "Two long"))
    # A title line belongs to its article; the blank line before it stays with the article before.
    assert excerpts.whole_articles(text, len(text)) == text
    assert excerpts.whole_articles(text, len(text) - 1).strip() == two.strip()
    assert excerpts.whole_articles(text, len(two) + 2).strip() == two.strip()


# --- the training


@pytest.fixture(scope="module")
def prepared(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and tokens of a corpus made of the calibration excerpt."""
    folder = tmp_path_factory.mktemp("training")
    text = (TEXT / "wikitext2-valid-excerpt.txt").read_text(encoding="utf-8")[:120_000]
    pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    (folder / "corpus.txt").write_text(f"\n{script.SEPARATOR}\n".join(pieces), encoding="utf-8")
    arguments = ["prepare", str(folder / "data"), str(folder / "corpus.txt"), "--vocab-size", "1500"]
    result = CliRunner().invoke(script.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "data"


def test_prepare_merges_recall_words_and_holds_documents_out(script: ModuleType, prepared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    assert len(tokenizer) <= 1500
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in NAMES + WORDS)
    ids = np.load(prepared / script.IDS_FILE)
    documents = tokenizer.decode(ids.astype(int).tolist()).split(script.SEPARATOR)
    held_out = (prepared / script.VALIDATION_FILE).read_text(encoding="utf-8")
    assert len(documents) - 1 == 58  # of 60, numbers 0 and 50 are held out
    assert not any(document in held_out for document in documents if document)


@examples(25)
@given(
    seed=st.integers(0, 10**6),
    facts_per_1k=st.sampled_from([1.0, 10.0, 60.0]),
    share=st.sampled_from([0.5, 1.0]),
)
def test_recall_rows(
    script: ModuleType, prepared: Path, seed: int, facts_per_1k: float, share: float
) -> None:
    """Every answer repeats a fact stated before it; without the insertions the text is untouched."""
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    stream = np.load(prepared / script.IDS_FILE)
    hyper = script.Hyper(sequence=600, batch=4, facts_per_1k=facts_per_1k, recall_share=share)
    ids, roles = script.Batches(stream, tokenizer, hyper, seed, "cpu").next()
    assert ids.shape == roles.shape == (4, 601)
    rows = round(4 * share)
    assert (roles[: 4 - rows] == script.TEXT).all()
    joined = " ".join(map(str, stream.tolist()))
    for row, role in zip(ids, roles, strict=True):
        text = row[role == script.TEXT].tolist()
        assert " ".join(map(str, text)) in joined
    for row, role in zip(ids[4 - rows :], roles[4 - rows :], strict=True):
        seen: dict[str, str] = {}
        for at in torch.nonzero(role == script.INJECTED).flatten().tolist():
            # A fact is injected whole: its name stands three tokens before the end of "... of NAME is WORD."
            name, word, stop = (tokenizer.decode([int(i)]).strip() for i in row[[at - 3, at - 1, at]])
            if stop == "." and role[at - 1] == script.INJECTED:
                assert name in NAMES
                assert word in WORDS
                assert seen.setdefault(name, word) == word
        for at in torch.nonzero(role == script.ANSWER).flatten().tolist():
            name, word = (tokenizer.decode([int(i)]).strip() for i in row[[at - 2, at]])
            assert seen[name] == word
            assert f" The password of {name} is {word}." in tokenizer.decode(row[:at].tolist())


def test_training_lowers_the_loss_and_saves(script: ModuleType, prepared: Path, tmp_path: Path) -> None:
    arguments = ["train", str(prepared), str(tmp_path / "model"), "--steps", "30", "--evaluations", "2"]
    arguments += ["--device", "cpu", "--no-compile"]
    small = {
        "sequence": 256, "batch": 4, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "warmup": 5,
        "learning_rate": 0.02,
    }  # fmt: skip
    for name, value in small.items():
        arguments += ["--set", f"{name}={value}"]
    result = CliRunner().invoke(script.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with (tmp_path / "model" / "training_log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 15, 30]
    losses = [float(row["validation_loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(1500), abs=0.3)
    assert losses[2] < losses[1] < losses[0] - 0.5
    assert float(rows[2]["answer_loss"]) < float(rows[0]["answer_loss"]) - 0.5

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert saved.dtype == torch.float16
    assert saved.config.max_position_embeddings == 256
    assert (
        saved.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id
    )
    assert not list(tmp_path.glob(".*.part"))


def test_training_ends_in_time_with_a_learning_rate_of_zero(
    script: ModuleType, prepared: Path, tmp_path: Path
) -> None:
    arguments = ["train", str(prepared), str(tmp_path / "model"), "--seconds", "1", "--device", "cpu"]
    small = ("sequence=64", "batch=2", "hidden_size=32", "intermediate_size=32", "num_hidden_layers=1")
    for setting in (*small, "num_attention_heads=1", "num_key_value_heads=1", "head_dim=32", "warmup=2"):
        arguments += ["--set", setting]
    result = CliRunner().invoke(script.app, [*arguments, "--no-compile"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with (tmp_path / "model" / "training_log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert 1 < int(rows[1]["step"]) < 8000
    assert float(rows[1]["learning_rate"]) == 0.0


def test_unknown_hyper_parameter_is_named(script: ModuleType, prepared: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(script.app, ["train", str(prepared), str(tmp_path), "--set", "layers=2"])
    assert result.exit_code == 2
    assert "layers" in result.output
    assert "num_hidden_layers" in result.output
