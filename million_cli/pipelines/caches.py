"""From a quantizer's configuration to caches: the one place that knows what each `quantizer.kind` needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.cache_utils import Cache, DynamicCache

from million_cli.calibration.samples import Samples
from million_cli.codecs import Calibrated, Codec, Shape, SimulatedCache
from million_cli.codecs.distort import DistortCache
from million_cli.errors import UserError
from million_cli.hf.pq_cache import PQCache
from million_cli.pipelines.config import checked
from million_cli.pipelines.sample import sample, sample_key
from million_cli.pipelines.session import Session
from million_cli.pipelines.train_codebook import train
from million_cli.pq import Codebook
from million_cli.registry import CACHES, CODECS
from million_cli.tasks.base import Prefill

logger = logging.getLogger("million")


class Caches:
    """Makes the caches of a job, one a batch, and remembers every fallback they met.

    Attributes:
        codebook: that serves the job, and `codebook_path`, its file; None for a dense cache.
        codec: of an alternative to product quantization, whose caches are simulated; one, or one a layer.
        codec_key: all that its results depend on, beside the configuration; {} without a codec.

    Raises:
        UserError: the codebook is missing or belongs to another model, or cannot be folded, or see `train`.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.codebook: Codebook | None = None
        self.codebook_path: Path | None = None
        self.codec: Codec | Sequence[Codec] | None = None
        self.codec_key: dict[str, str] = {}
        self._fallbacks: dict[str, None] = {}
        self._latest: Cache | None = None
        config = session.config
        if config.quantizer.kind == "pq":
            self._refuse_settings_of_other_caches()
            self.codebook_path = Path(config.codebook) if config.codebook else train(session)
            self.codebook = Codebook.load(self.codebook_path)
            self.codebook.check(session.fingerprint)
            if config.fold:
                self.codebook = session.fold(self.codebook)
        elif config.quantizer.kind != "dense":
            self.codec = self._make_codec()

    def _refuse_settings_of_other_caches(self) -> None:
        cache = self.session.config.cache
        read = {"kind", "page_size", "extended_residual", *CACHES.load(cache.kind).settings}
        for name, value in asdict(cache).items():
            if name not in read and value is not None:
                raise UserError(f"cache.{name}={value}: cache.kind={cache.kind} has no such setting")

    def _make_codec(self) -> Codec | Sequence[Codec]:
        """The configured codec, calibrated on the job's samples if it asks for them."""
        session, config = self.session, self.session.config
        kind = config.quantizer.kind
        codec_class = CODECS.load(kind)
        settings = checked("quantizer.codec", codec_class.Config, config.quantizer.codec)
        ours = session.fingerprint
        shape = Shape(ours.head_dim, config.cache.page_size, ours.num_kv_heads, len(ours.layers))
        codec: Codec = codec_class(settings, shape, config.seed)
        self.codec_key = CODECS.source(kind)
        if not isinstance(codec, Calibrated):
            return codec
        self.codec_key["sample"] = sample_key(session)
        return codec.calibrate(*Samples(sample(session)).sides())

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer has seen the calibration text."""
        return self.codebook is not None or "sample" in self.codec_key

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
        cache_class: Any = CACHES.load(config.cache.kind)
        own = {name: getattr(config.cache, name) for name in cache_class.settings}
        return cache_class(
            model,
            self.codebook,
            config.cache.window(),
            prefill=prefill,
            strict=config.strict,
            encoder=config.train.encoder,
            **own,
        )

    def _collect(self) -> None:
        if isinstance(self._latest, PQCache | DistortCache):
            self._fallbacks.update(dict.fromkeys(str(fallback) for fallback in self._latest.fallbacks))
