"""The recipe of a codebook: what is sampled, which codes, how they are trained.  Plain values, no torch here.

Hydra composes a `Recipe` from the groups `sample`, `quantizer` and `train` under `conf/`; the Python API
takes one, and a codebook's card holds one.  Seed, device and text are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from million_cli.conf import conf_folder
from million_cli.errors import UserError, at_least, check
from million_cli.spec import SCOPES, CodeSpec, PQSpec

if TYPE_CHECKING:
    from omegaconf import DictConfig

Encoder = Literal["torch", "keops", "faiss"]

ENCODERS: tuple[Encoder, ...] = ("torch", "keops", "faiss")
METRICS = ("euclidean", "fisher")
ROTATIONS = ("none", "hadamard", "opq")
SEEDINGS = ("kmeans++", "random")
TRAINERS = ("torch", "faiss")
WEIGHTINGS = ("none", "gradient")


@dataclass(frozen=True)
class Sampling:
    """How much of the calibration text is read, and how many vectors are kept of it.

    Attributes:
        tokens: read at most that many of the text (which may be shorter); code and repeats come on top.
        context: length of the windows the text is read in; null is the model's trained context, at most 2048.
        long: length of the longest windows, at most the model's trained context.
        long_share: of the text, about, that is read in such windows, as far as it fills them.
        batch: windows at once, fewer where a GPU's memory asks for it.
        reservoir: vectors kept per layer and KV head, for keys and for values.
        repeats: share of windows, beside those of the text, of random tokens that repeat themselves: whatever
            the text is, they show how the model's heads copy.
        code: share of windows of source code (the shipped `python-excerpt`): codebooks of prose alone lose
            twice as much on code, and those with some code in them lose nothing on prose.
        information: tokens, at most, whose gradients are gathered (see `pq.metric`, `pq.weights`); 0: none.
    """

    tokens: int = 65_536
    context: int | None = None
    long: int = 8192
    long_share: float = 0.1
    batch: int = 8
    reservoir: int = 32_768
    repeats: float = 0.1
    code: float = 0.3
    information: int = 131_072

    def __post_init__(self) -> None:
        for name in ("tokens", "long", "batch", "reservoir"):
            at_least(f"sample.{name}", getattr(self, name), 1)
        if not 0 <= self.long_share < 1:
            raise UserError(f"sample.long_share={self.long_share}: accepted are shares from 0, below 1")
        if self.context is not None:
            at_least("sample.context", self.context, 2)
        if min(self.repeats, self.code) < 0 or self.repeats + self.code >= 1:
            raise UserError(
                f"sample.repeats={self.repeats}, sample.code={self.code}: accepted are shares from 0, "
                "together below 1"
            )
        at_least("sample.information", self.information, 0)


@dataclass(frozen=True)
class SideCodes:
    """Codes of keys or of values.

    Attributes:
        M: subspaces; null makes each `dsub` dimensions wide, whatever the model's head_dim.
        dsub: dimensions of a subspace.
        nbits: of a code.
        rotation: applied after RoPE: `none`, `hadamard` or `opq` (fitted a layer and KV head).
        metric: of the squared error that training minimises: `euclidean`, or `fisher` (see `pq.metric`).
    """

    M: int | None = None
    dsub: int = 2
    nbits: int = 8
    rotation: str = "none"
    metric: str = "euclidean"

    def __post_init__(self) -> None:
        check("rotation", self.rotation, ROTATIONS)
        check("metric", self.metric, METRICS)

    def spec(self, head_dim: int) -> CodeSpec:
        """The shape of the codes for a model's head_dim.

        Raises:
            UserError: head_dim is not divisible, or nbits is out of range.
        """
        if self.M is None and (self.dsub < 1 or head_dim % self.dsub):
            raise UserError(f"dsub={self.dsub} does not divide head_dim={head_dim}")
        return CodeSpec(head_dim, self.M if self.M is not None else head_dim // self.dsub, self.nbits)


@dataclass(frozen=True)
class Quantizer:
    """Which codes keys and values get.

    Attributes:
        name: for the record.
        scope: one codebook for all (`merged`), per `layer`, or per layer and KV `head`.
        seeding: of k-means: `kmeans++`, or `random` as FAISS does it.
        weighting: of the samples in k-means, `none` or by their `gradient` (see `pq.weights`).
        keys, values: codes of either side.
        bits: mean bits of an element.  The keys and the values of each layer then get those of `widths` that
            keep the predicted KL divergence least, instead of their own `dsub`.  null: use `keys` and
            `values` as given; also the fallback without gradients.
        widths: dimensions of a subspace to choose from, with `keys.nbits` bits a code.
        positions: how many positions of a text the codes are made for, whatever the calibration windows are:
            sampled keys are turned to positions drawn from them.  null: the model's trained context; 0: those
            of the windows, as keys lie there.
        rebase: tokens of a block of positions, instead: keys are coded relative to the origin of theirs, so
            that codes serve texts of any length (see `pq.rebase`).  0: no blocks.
    """

    name: str = "custom"
    scope: str = "head"
    seeding: str = "kmeans++"
    weighting: str = "none"
    keys: SideCodes = field(default_factory=SideCodes)
    values: SideCodes = field(default_factory=SideCodes)
    bits: float | None = None
    widths: tuple[int, ...] = (1, 2, 4, 8)
    positions: int | None = None
    rebase: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # YAML and JSON have lists
        if self.positions is not None:
            at_least("quantizer.positions", self.positions, 0)
            if self.positions and self.rebase:
                raise UserError(
                    f"quantizer.positions={self.positions}: accepted without quantizer.rebase={self.rebase}, "
                    "which serves any position"
                )
        if self.rebase < 0 or self.rebase % 16:
            raise UserError(f"quantizer.rebase={self.rebase}: accepted are 0 and multiples of 16")
        check("quantizer.scope", self.scope, SCOPES)
        check("quantizer.seeding", self.seeding, SEEDINGS)
        check("quantizer.weighting", self.weighting, WEIGHTINGS)
        if self.bits is None:
            return
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
        if self.scope == "merged":
            raise UserError(
                f"quantizer.bits={self.bits:g}: layers of one codebook cannot differ; accepted scopes are "
                "layer and head"
            )

    def spec(self, head_dim: int) -> PQSpec:
        """The codes that `keys` and `values` ask for.

        Raises:
            UserError: as `SideCodes.spec`.
        """
        return PQSpec(self.keys.spec(head_dim), self.values.spec(head_dim))

    def choices(self, head_dim: int) -> tuple[CodeSpec, ...]:
        """The codes that `widths` offer to a budget of `bits`.

        Raises:
            UserError: as `SideCodes.spec`, or no mix of the choices has so many bits.
        """
        choices = tuple(SideCodes(dsub=width, nbits=self.keys.nbits).spec(head_dim) for width in self.widths)
        least, most = (f(choice.bits_per_element for choice in choices) for f in (min, max))
        if self.bits is not None and not least <= self.bits <= most:
            raise UserError(f"quantizer.bits={self.bits:g}: accepted are {least:g} to {most:g}")
        return choices


@dataclass(frozen=True)
class Training:
    """How codebooks are trained from samples.

    Attributes:
        trainer: which k-means: `torch` (batched, any device) or `faiss`.
        encoder: what finds nearest centroids when errors are measured, and in caches where no kernel serves:
            `torch`, `keops` or `faiss`, with the same codes.
        iterations: of k-means.
        alternations: of k-means (torch's) and rotation, if that is `opq`; 0 leaves its parametric form.
        max_samples_per_centroid: more samples than this times C are thinned at random (256 is FAISS's limit).
        held_out: share of the samples that errors are measured on, and that do not train.
        measured: tokens, about, on which the divergence predicted for `quantizer.bits` is checked, layer by
            layer and side: text and code, and long windows with far copies; 0 leaves the prediction as it is.
    """

    trainer: str = "torch"
    encoder: str = "torch"
    iterations: int = 25
    alternations: int = 0
    max_samples_per_centroid: int = 256
    held_out: float = 0.0625
    measured: int = 8192

    def __post_init__(self) -> None:
        check("train.trainer", self.trainer, TRAINERS)
        check("train.encoder", self.encoder, ENCODERS)
        at_least("train.iterations", self.iterations, 1)
        at_least("train.alternations", self.alternations, 0)
        at_least("train.max_samples_per_centroid", self.max_samples_per_centroid, 1)
        at_least("train.measured", self.measured, 0)
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"train.held_out={self.held_out}: accepted are shares from 0 to 0.5")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a codebook, next to the model, the text, the seed and the device."""

    quantizer: Quantizer = field(default_factory=Quantizer)
    sample: Sampling = field(default_factory=Sampling)
    train: Training = field(default_factory=Training)

    @classmethod
    def named(cls, name: str, *overrides: str) -> Recipe:
        """The recipe of `conf/quantizer/<name>.yaml` with the defaults of the other groups.

        Example: Recipe.named("pq-4bit", "quantizer.bits=3.5", "sample.tokens=32768").

        Raises:
            UserError: no such recipe, or as `override`.
        """
        recipes = _recipes()
        if name not in recipes:
            raise UserError(f"recipe={name}: accepted are {', '.join(recipes)}")
        groups = {group: _load(group, "default") for group in ("sample", "train")}
        return cls()._merged({**groups, "quantizer": recipes[name]}).override(*overrides)

    def override(self, *overrides: str) -> Recipe:
        """This recipe with some values changed, named as on the command line ("train.iterations=9").

        Raises:
            UserError: an unknown name, or a value of the wrong type or out of range.
        """
        from omegaconf import OmegaConf

        return self._merged(OmegaConf.from_dotlist(list(overrides)))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a `to_dict`.

        Raises:
            UserError: as `override`.
        """
        return cls()._merged(values)

    def _merged(self, values: Any) -> Recipe:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            merged = OmegaConf.to_object(OmegaConf.merge(writable(OmegaConf.structured(self)), values))
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key or 'recipe'}: {str(error).splitlines()[0]}") from error
        assert isinstance(merged, Recipe)
        return merged


def writable(config: DictConfig) -> DictConfig:
    """`config`, whose frozen dataclasses OmegaConf holds read-only, open to changes until it is an object."""
    from omegaconf import DictConfig

    config._set_flag("readonly", None)
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig):
            writable(node)
    return config


def _recipes() -> dict[str, dict[str, Any]]:
    """The quantizers under `conf/` that have codebooks, by name."""
    found = {
        path.stem: _load("quantizer", path.stem) for path in (conf_folder() / "quantizer").glob("*.yaml")
    }
    return {name: values for name, values in sorted(found.items()) if values.pop("kind", None) == "pq"}


def _load(group: str, name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    loaded: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{name}.yaml"))
    return dict(loaded)
