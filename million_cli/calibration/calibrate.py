"""From a model and a text to a codebook: the loop that the command line and the Python API share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from million_cli.calibration.information import (
    Information,
    NoGradients,
    mean_of_state,
    windows_at_once,
)
from million_cli.calibration.measured import Measure
from million_cli.calibration.moving import MovedKeys, Positions
from million_cli.calibration.samples import Sampled, Samples
from million_cli.calibration.sampling import SamplingCache, read_text
from million_cli.calibration.windows import CODE, batches, calibration_windows, measuring_windows
from million_cli.errors import UserError
from million_cli.hf.models import fingerprint
from million_cli.hf.rotary import Rotary
from million_cli.pq import Codebook, Setup
from million_cli.pq import train_codebook as train_on_samples
from million_cli.pq.rebase import Rebase
from million_cli.progress import progress
from million_cli.recipe import Recipe, Sampling
from million_cli.spec import WindowSpec
from million_cli.text import Text, load_text

logger = logging.getLogger("million")
SAVE_EVERY_S = 60.0
_TOKENIZER_PROBE_CHARACTERS = 4096


def train_codebook(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    recipe: str | Recipe = "pq-4bit",
    *,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    window: WindowSpec | None = None,
    show_progress: bool = True,
) -> Codebook:
    """Let `model` read `text`, sample its keys and values, and train a codebook on them.

    `million train-codebook` gives the same codebook for the same text, recipe, seed and device.

    Args:
        tokenizer: of the model.
        text: text of the kind that the cache will serve, but not the text it is judged on.
        recipe: a name under `conf/quantizer` ("pq-4bit"), or a recipe, such as
            `Recipe.named("pq-4bit", "quantizer.bits=3.5")`.
        seed: of every random choice, >= 0.
        folder: keeps the samples, so that an interrupted calibration continues; None keeps nothing.
        window: of the caches that will use the codebook: a budget of bits is measured behind it.
        show_progress: whether progress bars are shown, on stderr.

    Raises:
        UserError: an unknown recipe, a text too short for it, codes that do not fit the model, an unsupported
            architecture, or a folder with samples of something else.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe)
    given = Text(text, f"{len(text)} characters given by the caller")
    calibration = Calibration(model, tokenizer, given, recipe, seed, window or WindowSpec(), show_progress)
    return calibration.train(calibration.sample(None if folder is None else Path(folder)))


@dataclass
class Calibration:
    """One calibration of one model.

    Attributes:
        text: the text to read.
        recipe, seed: decide everything else.
        window: window of the caches; only a measured budget of bits depends on it.
        shown: whether progress bars are shown.

    Raises:
        UserError: the text is empty, or the trainer or encoder of the recipe is not available here.
    """

    model: PreTrainedModel
    tokenizer: Any
    text: Text
    recipe: Recipe
    seed: int = 0
    window: WindowSpec = field(default_factory=WindowSpec)
    shown: bool = True

    def __post_init__(self) -> None:
        self.setup = Setup(self.recipe, self.seed, str(self.model.device))
        if not self.text.content.strip():
            raise UserError("the calibration text is empty")

    @cached_property
    def windows(self) -> list[Tensor]:
        """Token ids `[T]` of each window that is read."""
        return calibration_windows(*self._reading)

    def sample(self, folder: Path | None = None, resume: bool = True) -> Sampled:
        """Read the text and sample K and V; continue or return an earlier calibration in `folder`.

        Args:
            folder: keeps the state, about once a minute and at the end; None keeps it in memory.
            resume: continue from the folder's state; otherwise replace it.

        Raises:
            UserError: a text too short, a context too long, a folder that cannot be written or that holds the
                samples of another calibration.
        """
        rotary = self.rotary if self.rotary.movable else None
        cache = SamplingCache(self.model, self.recipe.sample.reservoir, self.seed, rotary)
        # Behind the default window whatever the caches': samples serve all of them.
        information = Information(self.model, seed=self.seed, rotary=rotary)
        state = cache.resume(folder) if folder is not None and resume else None
        if state is not None and not {"windows", "tokens", "done", "inputs"} <= state.keys():
            raise UserError(
                f"{folder}: the manifest's progress is damaged; remove the folder to sample again"
            )
        if state is not None and state["inputs"] != self._inputs:
            raise UserError(
                f"{folder} holds samples of another text, tokenizer or recipe; accepted are an empty folder "
                "and one of the same calibration"
            )
        if folder is not None and state is not None:
            samples = Samples(folder)
            if state["done"]:
                logger.info("samples: %s (from an earlier run)", folder)
                return Sampled.in_folder(samples)
            logger.info("going on with the samples in %s at window %d", folder, state["windows"])
            gathered = samples.information()
            if gathered is not None:
                information.restore(gathered)
        self._read(cache, information, state["windows"] if state is not None else 0, folder)
        if folder is None:
            return cache.sampled(information)
        logger.info("samples: %s", folder)
        return Sampled.in_folder(Samples(folder))

    def train(self, sampled: Sampled) -> Codebook:
        """Train a codebook on the result of `sample`.

        Raises:
            UserError: as `pq.train_codebook`.
        """
        quantizer = self.recipe.quantizer
        metrics = (quantizer.keys.metric, quantizer.values.metric)
        informed = quantizer.bits is not None or quantizer.weighting != "none" or "fisher" in metrics
        keys, rebases, turned = sampled.keys, self.rebases(), None
        if self.rotary.movable:
            moved = self.recipe.quantizer.positions != 0
            positions = Positions(self.rotary, rebases, self._longest(rebases), self.seed, moved)
            keys = MovedKeys(keys, sampled.positions, positions, self.model.device)
            turned = positions.information
        gathered = sampled.information
        information = None if gathered is None else mean_of_state(gathered, turned)
        if information is None and informed:
            logger.warning(
                "no Fisher information: plain squared errors, unweighted samples and the widths of keys and "
                "values instead"
            )
        with progress(1, f"training {quantizer.name}", "k-means", self.shown) as bar:

            def tick(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            codebook = train_on_samples(
                keys,
                sampled.values,
                fingerprint(self.model),
                self.setup,
                information=information,
                squares=sampled.squares,
                calibration=self.text.source,
                calibration_sha256=self.text.sha256,
                tokens=sampled.tokens,
                measure=self.measure(rebases),
                progress=tick,
            )
        return replace(
            codebook,
            keys=replace(codebook.keys, rebases=rebases),
            meta=replace(codebook.meta, positions=self.rotary.limit if rebases else self._longest(rebases)),
        )

    @cached_property
    def rotary(self) -> Rotary:
        """How the model turns its keys."""
        return Rotary(self.model)

    def rebases(self) -> tuple[Rebase | None, ...]:
        """How keys are brought to the origin of their block, by layer; empty if they are coded as is."""
        every = self.recipe.quantizer.rebase
        if not every:
            return ()
        if not self.rotary.movable:
            logger.warning(
                "keys of this model cannot be moved (its positions are no rotation): codes are made for the "
                "positions of the calibration windows alone"
            )
            return ()
        return self.rotary.rebases(every)

    def _longest(self, rebases: Sequence[Rebase | None]) -> int:
        """Positions that samples are turned to."""
        wanted = self.recipe.quantizer.positions
        if rebases or (wanted is None and self.rotary.movable):
            return self.rotary.context
        windows = max(len(window) for window in self.windows)
        return max(wanted, windows) if wanted and self.rotary.movable else windows

    def measure(self, rebases: Sequence[Rebase | None] = ()) -> Measure | None:
        """Measures the cost of coding a side of a layer, if the recipe asks for it."""
        measured = self.recipe.train.measured if self.recipe.quantizer.bits is not None else 0
        if not measured:
            return None
        return Measure(
            self.model,
            partial(measuring_windows, *self._reading, measured),
            self.window,
            self.recipe.sample.batch,
            self.shown,
            rebases,
        )

    def _observe(self, cache: SamplingCache, information: Information, ids: Tensor) -> bool:
        """Sample windows `[B, T]` and gather their information in one pass; False: it gives no gradients."""
        try:
            for part in ids.split(windows_at_once(self.model, ids.shape[1])):
                cache.take(information.read(part))
        except NoGradients as error:
            logger.warning("codebooks will be trained without Fisher information: %s", error)
            information.forget()
            return False
        return True

    @property
    def _reading(self) -> tuple[PreTrainedModel, Any, Text, Sampling, int]:
        """The settings that decide the windows."""
        return self.model, self.tokenizer, self.text, self.recipe.sample, self.seed

    @cached_property
    def _inputs(self) -> str:
        """Digest of all that samples depend on, beside the fingerprint and the seed."""
        inputs = {
            "text": self.text.sha256,
            "code": load_text(CODE).sha256,
            "tokens": self.tokenizer(self.text.content[:_TOKENIZER_PROBE_CHARACTERS], verbose=False)[
                "input_ids"
            ],
            "sample": asdict(self.recipe.sample),
            "dtype": str(self.model.dtype),
        }
        return hashlib.sha256(json.dumps(inputs).encode("utf-8")).hexdigest()

    def _read(self, cache: SamplingCache, information: Information, done: int, folder: Path | None) -> None:
        """Read the windows from number `done` on, and keep the state in `folder`."""
        windows = self.windows
        total = sum(len(window) for window in windows)
        wanted = min(self.recipe.sample.information, total)
        saved = time.monotonic()

        def save(finished: bool) -> None:
            if folder is not None:
                state = {"windows": done, "tokens": cache.seen, "done": finished, "inputs": self._inputs}
                cache.save(folder, state, information.state())

        with progress(total, "sampling", "tok", self.shown) as bar:
            bar.update(cache.seen)
            for ids in batches(windows[done:], self.recipe.sample.batch):
                observed = max(0, wanted - information.read_tokens) // ids.shape[1]
                if observed and not self._observe(cache, information, ids[:observed]):
                    observed = wanted = 0
                if observed < len(ids):
                    read_text(self.model, cache, ids[observed:])
                bar.update(ids.numel())
                done += len(ids)
                if done < len(windows) and time.monotonic() - saved > SAVE_EVERY_S:
                    save(False)
                    saved = time.monotonic()
        save(True)
