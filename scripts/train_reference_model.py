"""Train the shipped reference model: a small Llama that reads English and recalls facts stated far back.

    python scripts/train_reference_model.py prepare DATA corpus/*.txt.xz     # CPU: tokenizer and tokens
    python scripts/train_reference_model.py train DATA MODEL                 # GPU: a few minutes
    python scripts/train_reference_model.py evaluate MODEL text.txt          # perplexity and recall

A corpus file is plain text or .xz; a line ``<|endoftext|>`` separates its documents.  Part of every batch is
text with facts and questions strewn in (the format of `million_cli.tasks.recall_text`).  The loss is the mean
over text tokens plus the mean over answers: as one mean, the few answers drown and the model never learns to
look facts up.  Other injected words carry no loss, so it does not learn to write facts itself.  Some rows ask
soon after the fact: lookup is learnt near first and then reaches far.

Long because the script stands alone: corpus, tokenizer, training and evaluation of one model.

Letters: B sequences, T tokens a sequence, E events (facts and questions) of a sequence.
"""

from __future__ import annotations

import copy
import csv
import json
import lzma
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from million_cli.tasks import recall_text
from million_cli.tasks.recall_text import NAMES, WORDS, Filler, RecallPrompt

SEPARATOR = "<|endoftext|>"
HELD_OUT_EVERY = 50  # every 50th document is for validation
TEXT, INJECTED, ANSWER = 0, 1, 2  # roles of a token in the loss
IDS_FILE, VALIDATION_FILE = "tokens.npy", "validation.txt"

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0] if __doc__ else None)


@dataclass(frozen=True)
class Hyper:
    """What defines a run, the data and the seed apart."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    sequence: int = 4096
    batch: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 200
    recall_share: float = 0.375  # of the sequences
    answer_weight: float = 1.0  # of the answers' mean loss beside the text's
    facts_per_1k: float = 20.0  # the most facts in 1024 tokens
    shortest_reach: float = 0.02  # smallest `reach` (see Batches.insert)


# --- data ---------------------------------------------------------------------------------------------------


def documents(path: Path) -> Iterator[str]:
    """The documents of one corpus file, without the separator lines."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for document in file.read().split(f"\n{SEPARATOR}\n"):
            if document.strip():
                yield document


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each name and word of the recall format is one token.

    Those words are added to the training text often enough to be merged whole.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    repeats = max(10, sum(map(len, texts)) // 5000)
    recall = (f" {word}" * repeats for word in NAMES + WORDS)
    tokenizer.train_from_iterator((t for part in (texts, recall) for t in part), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, pad_token=SEPARATOR
    )


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(help="folder to write")],
    corpus: Annotated[list[Path], typer.Argument(help="text files, .txt or .txt.xz", exists=True)],
    vocab_size: Annotated[int, typer.Option(help="tokens of the tokenizer")] = Hyper.vocab_size,
) -> None:
    """Train the tokenizer; write it, the training tokens and the held-out text to DATA."""
    texts = [text for path in corpus for text in documents(path)]
    held_out = texts[::HELD_OUT_EVERY]
    texts = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
    data.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(data)
    (data / VALIDATION_FILE).write_text(f"\n{SEPARATOR}\n".join(held_out), encoding="utf-8")
    ids: list[np.ndarray] = []
    for start in tqdm(range(0, len(texts), 256), desc="tokenising", unit="batch"):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 256]):
            ids.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
    np.save(data / IDS_FILE, np.concatenate(ids))
    typer.echo(f"{len(texts)} documents, {sum(map(len, ids)):,} tokens; {len(held_out)} documents held out")


class Batches:
    """Random windows of the token stream, some with facts and questions inserted; all on one device."""

    def __init__(
        self, ids: np.ndarray, tokenizer: PreTrainedTokenizerFast, hyper: Hyper, seed: int, device: str
    ):
        self.hyper = hyper
        self.device = torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.max_facts = min(len(NAMES), max(1, int(hyper.facts_per_1k * hyper.sequence / 1024)))
        self.ids = torch.from_numpy(ids.astype(np.int64)).to(device)
        # Insertions go where `Filler` puts them: after . ! ? before white space.
        text = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
        ends = np.array([t[-1:] in (".", "!", "?") for t in text])
        starts = np.array([t[:1].isspace() for t in text])
        boundaries = np.flatnonzero(ends[ids[:-1]] & starts[ids[1:]])
        assert len(boundaries), "the text has no sentences"
        following = np.searchsorted(boundaries, np.arange(len(ids)))
        self.next_boundary = torch.from_numpy(np.append(boundaries, len(ids))[following]).to(device)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text)

        self.names = torch.tensor([encode(f" {w}") for w in NAMES], device=device).squeeze(1)
        self.words = torch.tensor([encode(f" {w}") for w in WORDS], device=device).squeeze(1)
        name, word = NAMES[0], WORDS[0]
        fact = encode(recall_text.FACT.format(name=name, word=word))
        question = encode(recall_text.QUESTION.format(name=name) + recall_text.ANSWER.format(word=word) + ".")
        self.width = max(len(fact), len(question))
        self.lengths = torch.tensor([len(fact), len(question)], device=device)
        padded = [row + [0] * (self.width - len(row)) for row in (fact, question)]
        self.template = torch.tensor(padded, device=device)
        self.is_name = self.template == self.names[0]
        self.is_word = self.template == self.words[0]

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def next(self) -> tuple[Tensor, Tensor]:
        """(ids [B, T + 1] int64, roles [B, T + 1] int64): text rows first, recall rows last."""
        B, width = self.hyper.batch, self.hyper.sequence + 1
        last = len(self.ids) - width
        start = torch.randint(last + 1, (B, 1), generator=self.generator, device=self.device)
        ids = self.ids[start + torch.arange(width, device=self.device)]
        roles = torch.full_like(ids, TEXT)
        rows = round(B * self.hyper.recall_share)
        if rows:
            ids[-rows:], roles[-rows:] = self.insert(ids[-rows:], start[-rows:])
        return ids, roles

    def insert(self, ids: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Insert 1 to max_facts facts, each asked once later, into ids [B, W], the stream from start [B, 1].

        A question lies within `reach` (shortest_reach to 1, by row) of the text that is left after its fact.
        Returns ids and roles, [B, W] both: what insertions push past the end is lost.
        """
        (B, W), N = ids.shape, self.max_facts
        fact_at = self.rand(B, N) * self.rand(B, 1).sqrt()
        reach = self.hyper.shortest_reach ** self.rand(B, 1).square()
        ask_at = fact_at + reach * (1 - fact_at) * self.rand(B, N)
        stated = torch.arange(N, device=self.device) < (1 + self.rand(B, 1) * N).long()
        names = self.names[self.rand(B, len(NAMES)).argsort(1)[:, :N]]
        words = self.words[self.rand(B, len(WORDS)).argsort(1)[:, :N]]

        at, order = torch.cat([fact_at, ask_at], 1).sort(1)  # [B, E]
        question, pair = order // N, order % N
        name, word = names.gather(1, pair)[..., None], words.gather(1, pair)[..., None]
        content = torch.where(self.is_name[question], name, self.template[question])
        content = torch.where(self.is_word[question], word, content)  # [B, E, width]
        content_roles = torch.where(self.is_word[question] & (question == 1)[..., None], ANSWER, INJECTED)
        length = self.lengths[question] * stated.gather(1, pair)

        # Insert before filler token `before`; the filler shifts right by all that is inserted up to there.
        room = (W - length.sum(1, keepdim=True)).clamp(min=1)
        position = start + (at * room).long()
        before = (self.next_boundary[position] + 1 - start).clamp(max=W)
        inserted = torch.zeros(B, W + 1, dtype=torch.long, device=self.device).scatter_add_(1, before, length)
        filler_to = torch.arange(W, device=self.device) + inserted.cumsum(1)[:, :W]
        step = torch.arange(self.width, device=self.device)
        event_to = (before + length.cumsum(1) - length)[..., None] + step
        event_to = event_to.masked_fill(step >= length[..., None], W)

        to = torch.cat([filler_to, event_to.flatten(1)], 1).clamp(max=W)  # column W takes what falls off
        out = torch.zeros(B, W + 1, dtype=torch.long, device=self.device)
        roles = torch.zeros_like(out)
        out.scatter_(1, to, torch.cat([ids, content.flatten(1)], 1))
        roles.scatter_(1, to, torch.cat([torch.full_like(ids, TEXT), content_roles.flatten(1)], 1))
        return out[:, :W], roles[:, :W]


# --- model --------------------------------------------------------------------------------------------------


def build_model(hyper: Hyper, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised Llama; residual projections start smaller with depth, as in GPT-2."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hyper.hidden_size,
        intermediate_size=hyper.intermediate_size,
        num_hidden_layers=hyper.num_hidden_layers,
        num_attention_heads=hyper.num_attention_heads,
        num_key_value_heads=hyper.num_key_value_heads,
        head_dim=hyper.head_dim,
        max_position_embeddings=hyper.sequence,
        rope_parameters={"rope_type": "default", "rope_theta": hyper.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * hyper.num_hidden_layers))
    return model


def token_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Cross entropy in nats of ids [B, T + 1] but the first of a row: [B, T] float32; bfloat16 inside."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, ids: Tensor, length: int) -> float:
    """Mean loss in nats a token over ids [N], read in windows of `length` tokens."""
    windows = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    losses = [token_losses(model, window[None]).flatten() for window in windows if len(window) > 1]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def recall_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[RecallPrompt], batch: int = 16
) -> float:
    """Share of the prompts after which the answer is the most likely next token."""
    correct = 0
    for first in range(0, len(items), batch):
        group = items[first : first + batch]
        rows = tokenizer(
            [item.prompt for item in group], padding=True, padding_side="right", return_tensors="pt"
        )
        ids = rows["input_ids"].to(model.device)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            last = rows["attention_mask"].sum(1).to(ids.device) - 1
            predicted = model.lm_head(hidden[torch.arange(len(ids), device=ids.device), last]).argmax(-1)
        answers = [tokenizer.encode(item.answer)[0] for item in group]
        correct += int((predicted.cpu() == torch.tensor(answers)).sum())
    return correct / len(items)


def recall_items(
    text: str, tokenizer: PreTrainedTokenizerFast, longest: int, samples: int
) -> dict[str, list[RecallPrompt]]:
    """Prompts by (length, facts), named as the log's columns; lengths are powers of two up to `longest`."""
    filler = Filler(text, lambda s: len(tokenizer.encode(s)))
    lengths = [n for n in (512, 1024, 2048, 4096) if n <= longest]
    return {
        f"recall_{length}_{facts}": [
            recall_text.recall_prompt(filler, length, f"{facts}/{i}", facts=facts) for i in range(samples)
        ]
        for length in lengths
        for facts in (1, 4, 8)
    }


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (float16) and tokenizer into `folder`, file by file, each whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    half = copy.deepcopy(model).half()
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()


# --- commands -----------------------------------------------------------------------------------------------


def train_model(
    data: Path,
    out: Path,
    hyper: Hyper,
    *,
    steps: int,
    evaluations: int,
    seed: int,
    device: str,
    compiled: bool,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Train, evaluating and saving `evaluations` times; returns the rows of `training_log.csv`.

    seconds: the learning rate falls to zero within that time, counted from the second step on (the first one
    compiles), or within `steps`, whichever is sooner; then it ends.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data)
    model = build_model(hyper, tokenizer)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    batches = Batches(np.load(data / IDS_FILE), tokenizer, hyper, seed, device)
    validation = (data / VALIDATION_FILE).read_text(encoding="utf-8").replace(f"\n{SEPARATOR}\n", "\n\n")
    items = recall_items(validation, tokenizer, hyper.sequence, samples=64)
    validation_ids = torch.tensor(tokenizer.encode(validation)[: 32 * hyper.sequence], device=device)
    # Muon (orthogonalised momentum) for the layers' matrices: 0.17 nats below AdamW after 80M tokens.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    lr, decay = hyper.learning_rate, hyper.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=decay),
    ]
    clock: list[float] = []  # when the first step was over

    def left(step: int) -> float:
        """Of the steps or of the time, whichever is less."""
        of_time = 1 - (time.monotonic() - clock[0]) / seconds if seconds and clock else 1.0
        return max(0.0, min(1 - step / steps, of_time))

    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / hyper.warmup, left(step)))
        for o in optimizers
    ]
    losses_of = torch.compile(token_losses) if compiled else token_losses
    out.mkdir(parents=True, exist_ok=True)
    log: list[dict[str, Any]] = []
    began = time.monotonic()
    progress = tqdm(range(1, steps + 1), desc="training", unit="step", mininterval=5)
    for step in progress:
        ids, roles = batches.next()
        losses, roles = losses_of(model, ids), roles[:, 1:]
        text_mean, answer_mean = (
            (losses * (roles == role)).sum() / (roles == role).sum().clamp(min=1) for role in (TEXT, ANSWER)
        )
        (text_mean + hyper.answer_weight * answer_mean).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if not clock:
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            clock.append(time.monotonic())
        over = left(step) == 0.0
        if step == 1 or over or step % max(1, steps // evaluations) == 0:
            model.eval()
            log.append(
                {
                    "step": step,
                    "tokens": step * hyper.batch * hyper.sequence,
                    "seconds": round(time.monotonic() - began, 1),
                    "learning_rate": schedules[0].get_last_lr()[0],
                    "train_loss": round(text_mean.item(), 4),
                    "answer_loss": round(answer_mean.item(), 4),
                    "validation_loss": round(text_loss(model, validation_ids, hyper.sequence), 4),
                    **{name: recall_accuracy(model, tokenizer, group) for name, group in items.items()},
                }
            )
            model.train()
            tqdm.write(", ".join(f"{k} {v:.4g}" for k, v in log[-1].items()))
            save_model(model, tokenizer, out)
            write_log(out / "training_log.csv", log)
        if over:
            break
    return log


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="folder written by `prepare`", exists=True)],
    out: Annotated[Path, typer.Argument(help="folder for the model")],
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 8000,
    seconds: Annotated[float | None, typer.Option(help="at most that long, learning rate and all")] = None,
    evaluations: Annotated[int, typer.Option(help="how often to evaluate, log and save")] = 10,
    seed: Annotated[int, typer.Option(help="weights and batches")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="use torch.compile")] = True,
    hyper: Annotated[list[str] | None, typer.Option("--set", help="a hyper-parameter, as name=value")] = None,
) -> None:
    """Train on DATA and write the model, tokenizer and training_log.csv to OUT."""
    changed = {}
    for name, _, value in (item.partition("=") for item in hyper or []):
        if name not in Hyper.__dataclass_fields__:
            raise typer.BadParameter(f"{name}: accepted are {', '.join(Hyper.__dataclass_fields__)}")
        changed[name] = type(getattr(Hyper, name))(value)
    settings = Hyper(**changed)
    typer.echo(json.dumps({"steps": steps, "seed": seed, **asdict(settings)}))
    train_model(
        data,
        out,
        settings,
        steps=steps,
        evaluations=evaluations,
        seed=seed,
        device=device,
        compiled=compiled,
        seconds=seconds,
    )


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a trained model", exists=True)],
    text: Annotated[Path, typer.Argument(help="a text that was not trained on", exists=True)],
    samples: Annotated[int, typer.Option(help="prompts for each length and number of facts")] = 200,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print perplexity on TEXT and recall with TEXT as filler, by context length and number of facts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.to(device)
    content = text.read_text(encoding="utf-8")
    longest = model.config.max_position_embeddings
    ids = torch.tensor(tokenizer.encode(content), device=device)
    for length in (1024, longest):
        loss = text_loss(model, ids, length)
        typer.echo(f"perplexity, windows of {length}: {math.exp(loss):.3f} ({loss:.4f} nats a token)")
    for name, items in recall_items(content, tokenizer, longest, samples).items():
        typer.echo(f"{name}: {recall_accuracy(model, tokenizer, items):.3f}")


if __name__ == "__main__":
    app()
