"""The configuration of a job: what Hydra composes from `conf/`, typed.  No torch here.

`JobConfig` is the schema that every composed configuration is merged into, so an unknown key or a value of
the wrong type is refused before anything runs.  `task`, `also` and `bench` are open mappings here; each is
checked against its task's own dataclass when the job starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from million_cli.errors import UserError, at_least, check
from million_cli.recipe import Quantizer, Recipe, Sampling, Training, writable
from million_cli.registry import BENCHES, CACHES, CODECS, TASKS
from million_cli.spec import WindowSpec
from million_cli.text import TextConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

STAGES = ("baseline", "sample", "train", "evaluate", "bench")


def check_name(name: str, value: str) -> None:
    """Raise UserError unless `value` can be part of a file's name: no file leaves the output folder."""
    plain = value.isprintable() and not set("/\\") & set(value)
    if not 1 <= len(value) <= 100 or value.startswith(".") or not plain:
        raise UserError(
            f"{name}={value!r}: accepted are names of 1 to 100 printable characters without / and \\ "
            "that do not start with a dot"
        )


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


@dataclass(frozen=True)
class QuantizerConfig(Quantizer):
    """How keys and values are stored: the codes of a `Quantizer`, or an alternative to them.

    Attributes:
        kind: `dense` (not at all), `pq`, or a codec of `registry.CODECS`, whose cache is simulated (it shows
            quality, not memory or time).
        codec: settings of such a codec, see its own `Config`.
    """

    kind: str = "dense"
    codec: dict[str, Any] = field(default_factory=dict)

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
        super().__post_init__()

    @classmethod
    def dense(cls) -> QuantizerConfig:
        """Nothing is quantised."""
        return cls(name="dense", kind="dense")

    @property
    def codes(self) -> Quantizer:
        """The part that a recipe has."""
        return Quantizer(**{f.name: getattr(self, f.name) for f in fields(Quantizer)})


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
class ReportConfig:
    """The settings of `million report`.

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
    sample: Sampling = field(default_factory=Sampling)
    train: Training = field(default_factory=Training)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig.dense)
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
            self.quantizer = QuantizerConfig.dense()
            self.cache.kind = "dense"
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"out={self.out}: there is a file of that name; accepted is a folder")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the job's codebook."""
        return Recipe(self.quantizer.codes, self.sample, self.train)


def schema() -> DictConfig:
    """`JobConfig` as the schema that configurations are merged into."""
    from omegaconf import OmegaConf

    return writable(OmegaConf.structured(JobConfig))


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
