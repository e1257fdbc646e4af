"""From a quantizer's configuration to caches: the one place that knows what each `quantizer.kind` needs."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.cache_utils import Cache, DynamicCache

from million_cli.codecs import Codec, CodecSpec, SimulatedCache, make_codec
from million_cli.codecs.distort import DistortCache
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache, PagedPQCache, PQCache
from million_cli.pipelines.config import BASELINES
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train
from million_cli.pq import Codebook
from million_cli.tasks.base import Prefill

logger = logging.getLogger("million")


class Caches:
    """Makes the caches of a job, one a batch, and remembers every fallback they met.

    Attributes:
        codebook: that serves the job, and `codebook_path`, its file; None for a dense cache.
        codec: of an alternative to product quantization, whose caches are simulated.

    Raises:
        UserError: the codebook is missing or belongs to another model, or cannot be folded, or see `train`.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.codebook: Codebook | None = None
        self.codebook_path: Path | None = None
        self.codec: Codec | None = None
        self._fallbacks: dict[str, None] = {}
        self._latest: Cache | None = None
        config = session.config
        if config.quantizer.kind == "pq":
            self.codebook_path = Path(config.codebook) if config.codebook else train(session)
            self.codebook = Codebook.load(self.codebook_path)
            self.codebook.check(session.fingerprint)
            if config.fold:
                self.codebook = session.fold(self.codebook)
        elif config.quantizer.kind in BASELINES:
            self.codec = make_codec(config.quantizer.kind, self._codec_spec())

    def _codec_spec(self) -> CodecSpec:
        config = self.session.config
        return CodecSpec(
            self.session.fingerprint.head_dim,
            config.cache.page_size,
            config.quantizer.nbits,
            config.quantizer.group,
            config.quantizer.hadamard,
            config.seed,
        )

    def __call__(self, prefill: Prefill) -> Cache:
        """An empty cache; see `tasks.base.CacheFactory`."""
        self._collect()
        self._latest = self._make(prefill)
        return self._latest

    @property
    def fallbacks(self) -> list[str]:
        """Every fallback so far, each once, in order."""
        self._collect()
        return list(self._fallbacks)

    def _make(self, prefill: Prefill) -> Cache:
        config, model = self.session.config, self.session.model
        if self.codec is not None:
            if prefill == "distort":
                raise UserError(f"mode=distort: accepted for pq quantizers, not for {config.quantizer.name}")
            return SimulatedCache(model, self.codec, config.cache.window(), prefill=prefill)
        if self.codebook is None:
            return DynamicCache(config=model.config)
        if prefill == "distort":
            return DistortCache(model, self.codebook)
        window = config.cache.window()
        if config.cache.kind == "paged":
            return PagedPQCache(
                model,
                self.codebook,
                window,
                max_pages=config.cache.max_pages,
                prefill=prefill,
                strict=config.strict,
            )
        return DynamicPQCache(model, self.codebook, window, prefill=prefill, strict=config.strict)

    def _collect(self) -> None:
        if isinstance(self._latest, PQCache):
            self._fallbacks.update(dict.fromkeys(str(fallback) for fallback in self._latest.fallbacks))
