"""The configuration of a job: what Hydra composes from `conf/`, typed.  No torch here.

`JobConfig` is the schema that every composed configuration is merged into, so an unknown key or a value of
the wrong type is refused before anything runs.  `task`, `also` and `bench` are open mappings here; each is
checked against its task's own dataclass when the job starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from million_cli.errors import UserError
from million_cli.registry import BENCHES, CACHES, CODECS, TASKS
from million_cli.spec import SCOPES, CodeSpec, PQSpec, WindowSpec
from million_cli.text import TextConfig

TRAINERS = ("torch", "faiss")
METRICS = ("euclidean", "fisher")
SEEDINGS = ("kmeans++", "random")
WEIGHTINGS = ("none", "gradient")
STAGES = ("baseline", "sample", "train", "evaluate", "bench")


def check(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise UserError(f"{name}={value}: accepted are {', '.join(accepted)}")


def check_name(name: str, value: str) -> None:
    """Raise UserError unless `value` can be part of a file's name: no file leaves the output folder."""
    plain = value.isprintable() and not set("/\\") & set(value)
    if not 1 <= len(value) <= 100 or value.startswith(".") or not plain:
        raise UserError(
            f"{name}={value!r}: accepted are names of 1 to 100 printable characters without / and \\ "
            "that do not start with a dot"
        )


def at_least(name: str, value: int, least: int) -> None:
    """Raise UserError unless `value` >= `least`."""
    if value < least:
        raise UserError(f"{name}={value}: accepted are integers from {least}")


@dataclass
class ModelConfig:
    """Which model: `path` to load one, or `shape` for random weights.

    Attributes:
        name: for the record.
        path: a folder, a GGUF file, a name on the hub, `reference`, the model shipped with the package, or
            `smollm2`.
        shape: instead of a path, fields of a transformers configuration with `model_type`; weights are then
            random, drawn from the job's seed, and the tokenizer reads bytes.
        dtype: auto, float16, bfloat16, float32 or float64; auto is float32 on a CPU, else the checkpoint's.
        trust_remote_code: run Python code that comes with the model; without it such a model is refused.
    """

    name: str = "reference"
    path: str | None = "reference"
    shape: dict[str, Any] | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_name("model.name", self.name)
        if not self.path and not self.shape:
            raise UserError("model.path is empty; accepted are a folder, a GGUF file and a model on the hub")


@dataclass
class SideConfig:
    """Codes of keys or of values.

    Attributes:
        M: subspaces; null makes each `dsub` dimensions wide, whatever the model's head_dim.
        nbits: of a code.
        rotation: what is applied after RoPE: `none`, `hadamard` or `opq` (fitted a layer and KV head).
        metric: in which the squared error of coding is least: `euclidean`, or `fisher` (see `pq.metric`).
    """

    M: int | None = None
    dsub: int = 2
    nbits: int = 8
    rotation: str = "none"
    metric: str = "euclidean"

    def __post_init__(self) -> None:
        check("metric", self.metric, METRICS)

    def spec(self, head_dim: int) -> CodeSpec:
        """The side's shape for a model's head_dim.

        Raises:
            UserError: head_dim is not divisible, or nbits is out of range.
        """
        if self.M is None and (self.dsub < 1 or head_dim % self.dsub):
            raise UserError(f"dsub={self.dsub} does not divide head_dim={head_dim}")
        return CodeSpec(head_dim, self.M if self.M is not None else head_dim // self.dsub, self.nbits)


@dataclass
class QuantizerConfig:
    """How keys and values are stored.

    Attributes:
        kind: `dense` (not at all), `pq`, or a codec of `registry.CODECS`, whose cache is simulated (it shows
            quality, not memory or time).
        codec: settings of such a codec, see its own `Config`.
        scope: one codebook for all (`merged`), per `layer`, or per layer and KV `head`.
        seeding: of k-means: `kmeans++`, or `random` as FAISS does it.
        weighting: of the samples in k-means, `none` or by their `gradient` (see `pq.weights`); `none` where
            the model gives no gradients.
        bits: mean bits of an element; each layer's keys and values then take the one of `widths` with which
            the predicted KL divergence is least, instead of their own `dsub`.  null: as `keys` and `values`
            say, and so it is where the model gives no gradients to predict from.
        widths: dimensions of a subspace to choose from, with `keys.nbits` bits a code.
    """

    name: str = "dense"
    kind: str = "dense"
    codec: dict[str, Any] = field(default_factory=dict)
    scope: str = "head"
    seeding: str = "kmeans++"
    weighting: str = "none"
    keys: SideConfig = field(default_factory=SideConfig)
    values: SideConfig = field(default_factory=SideConfig)
    bits: float | None = None
    widths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])

    def __post_init__(self) -> None:
        check_name("quantizer.name", self.name)
        check("quantizer.kind", self.kind, ("dense", "pq", *CODECS.names))
        if self.kind in CODECS.names:
            CODECS.check(self.kind)
        elif self.codec:
            key, value = next(iter(self.codec.items()))
            raise UserError(
                f"quantizer.codec.{key}={value}: quantizer.kind={self.kind} has no such settings; accepted "
                f"with {', '.join(CODECS.names)}"
            )
        check("quantizer.scope", self.scope, SCOPES)
        check("quantizer.seeding", self.seeding, SEEDINGS)
        check("quantizer.weighting", self.weighting, WEIGHTINGS)
        if self.bits is not None:
            for name, side in (("keys", self.keys), ("values", self.values)):
                if side.M is not None:
                    raise UserError(
                        f"quantizer.{name}.M={side.M}: quantizer.bits={self.bits:g} chooses it by layer; "
                        "accepted with quantizer.bits=null"
                    )
            if self.keys.nbits != self.values.nbits:
                raise UserError(
                    f"quantizer.values.nbits={self.values.nbits}: accepted with quantizer.bits is that of "
                    f"keys, {self.keys.nbits}"
                )
            if not self.widths:
                raise UserError("quantizer.widths=[]: accepted are some numbers of dimensions")

    def spec(self, head_dim: int) -> PQSpec:
        """What `keys` and `values` say.

        Raises:
            UserError: as `SideConfig.spec`.
        """
        return PQSpec(self.keys.spec(head_dim), self.values.spec(head_dim))

    def choices(self, head_dim: int) -> tuple[CodeSpec, ...]:
        """What `widths` offer.

        Raises:
            UserError: as `SideConfig.spec`.
        """
        return tuple(SideConfig(dsub=w, nbits=self.keys.nbits).spec(head_dim) for w in self.widths)


@dataclass
class CacheConfig:
    """Where codes live.

    Attributes:
        kind: `dense` (transformers' own cache), `contiguous` or `paged`.
        page_size: P, tokens encoded at once.
        extended_residual: R, the residual window; see `spec.WindowSpec`.
        max_pages: size of the page pool, for all sequences together; null lets it grow with the text.
    """

    kind: str = "paged"
    page_size: int = 64
    extended_residual: int = 128
    max_pages: int | None = None

    def __post_init__(self) -> None:
        CACHES.check(self.kind)
        if self.max_pages is not None:
            at_least("cache.max_pages", self.max_pages, 1)
        self.window()

    def window(self) -> WindowSpec:
        return WindowSpec(self.page_size, self.extended_residual)


@dataclass
class SampleConfig:
    """How much of the calibration text is read, and how many vectors per layer and head are kept of it.

    Attributes:
        tokens: read at most that many of the text (which may be shorter); code and repeats come on top.
        context: length of the windows the text is read in; null is the model's trained context, at most 2048.
        batch: windows at once.
        reservoir: vectors kept per layer and KV head, for keys and for values.
        repeats: share of windows, beside those of the text, of random tokens that repeat themselves: whatever
            the text is, they show what the model's heads do when they copy.
        code: share of windows of source code (the shipped `python-excerpt`): codebooks of prose alone lose
            twice as much on code, and those with some code in them lose nothing on prose.
        information: tokens, at most, whose gradients are gathered (see `pq.metric`, `pq.weights`); 0: none.
    """

    tokens: int = 65_536
    context: int | None = None
    batch: int = 4
    reservoir: int = 32_768
    repeats: float = 0.1
    code: float = 0.3
    information: int = 131_072

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "reservoir"):
            at_least(f"sample.{name}", getattr(self, name), 1)
        if self.context is not None:
            at_least("sample.context", self.context, 2)
        if min(self.repeats, self.code) < 0 or self.repeats + self.code >= 1:
            raise UserError(
                f"sample.repeats={self.repeats}, sample.code={self.code}: accepted are shares from 0, "
                "together below 1"
            )
        at_least("sample.information", self.information, 0)


@dataclass
class TrainConfig:
    """How codebooks are trained from samples.

    Attributes:
        trainer: `torch` (batched, any device) or `faiss`.
        iterations: of k-means.
        alternations: of k-means and rotation, where the rotation is `opq`; 0 is its parametric form.
        max_samples_per_centroid: more samples than this times C are thinned at random.
        measured: tokens, about, of text and code on which what `quantizer.bits` predicts is checked, layer by
            layer and side; 0 leaves it as it is.
    """

    trainer: str = "torch"
    iterations: int = 25
    alternations: int = 0
    max_samples_per_centroid: int = 256
    measured: int = 4096

    def __post_init__(self) -> None:
        check("train.trainer", self.trainer, TRAINERS)
        at_least("train.iterations", self.iterations, 1)
        at_least("train.alternations", self.alternations, 0)
        at_least("train.max_samples_per_centroid", self.max_samples_per_centroid, 1)
        at_least("train.measured", self.measured, 0)


@dataclass
class ReportConfig:
    """What `million report` shows.

    Attributes:
        files: CSVs and folders of them; empty is `results.csv` under `out`.
        codebooks: codebook files whose errors are shown.
        run: of jobs, `latest` or `all`; null is the latest of `out`'s results, and all of files that are
            named.
        page: write the page; without it there is the table on the terminal alone.
    """

    files: list[str] = field(default_factory=list)
    codebooks: list[str] = field(default_factory=list)
    run: str | None = None
    page: bool = True


@dataclass
class JobConfig:
    """One job.

    Attributes:
        task: what `million eval` measures.
        also: further tasks (name -> configuration) for the same record.
        bench: what `million bench` times.
        stages: what `million run` chains.
        codebook: a trained codebook file; null trains one from `data` (or takes it from an earlier run).
        fold: put the values' rotation into the model's projections (exact up to rounding), instead of undoing
            it on the output of attention.
        device: auto, cpu, cuda or cuda:<number>; auto is the GPU if there is one.
        strict: a fallback is an error.
        allow_same_text: judge on the calibration text all the same.
        reuse: take finished stages from `out` if nothing that matters has changed.
        out: folder for results, codebooks and samples.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: TextConfig = field(default_factory=TextConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    task: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)
    report: ReportConfig = field(default_factory=ReportConfig)
    stages: list[str] = field(default_factory=lambda: ["sample", "train", "evaluate"])
    codebook: str | None = None
    fold: bool = False
    seed: int = 0
    device: str = "auto"
    strict: bool = False
    allow_same_text: bool = False
    reuse: bool = True
    out: str = "outputs"

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError(f"stages=[]: accepted are some of {', '.join(STAGES)}")
        for stage in self.stages:
            check("stages", stage, STAGES)
        if self.quantizer.kind == "dense" or self.cache.kind == "dense":
            # Either means that nothing is quantised; the record says so in both places.
            self.quantizer = QuantizerConfig(name="dense", kind="dense")
            self.cache.kind = "dense"
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"out={self.out}: there is a file of that name; accepted is a folder")


def typed(where: str, settings: Mapping[str, Any]) -> Any:
    """A task's own configuration from the open mapping at `where`: `task`, `also.<name>` or `bench`.

    Raises:
        UserError: an unknown task, or see `checked`.
    """
    registry = BENCHES if where == "bench" else TASKS
    return checked(where, registry.load(str(settings.get("name"))).Config, settings)


def checked(where: str, dataclass: Any, settings: Mapping[str, Any]) -> Any:
    """An instance of `dataclass` from the open mapping at `where`.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    accepted = [f.name for f in fields(dataclass)]
    for key in settings:
        if key not in accepted:
            raise UserError(f"unknown key {where}.{key}; accepted are {', '.join(accepted) or 'none'}")
    try:
        schema = OmegaConf.structured(dataclass)
        OmegaConf.set_readonly(schema, False)  # of a frozen dataclass
        return OmegaConf.to_object(OmegaConf.merge(schema, dict(settings)))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}") from error
