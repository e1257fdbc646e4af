"""A recipe with the device and seed of its training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from million_cli.pq.codec import find_encoder
from million_cli.pq.faiss_kmeans import import_faiss
from million_cli.recipe import Recipe


@dataclass(frozen=True)
class Setup:
    """How one codebook is trained.

    recipe: the codes and their training; seed: of every random choice; device: where k-means runs.

    Raises:
        UserError: the trainer or encoder of the recipe is not available here.
    """

    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.recipe.train.trainer == "faiss":
            import_faiss()
        find_encoder(self.recipe.train.encoder)

    def override(self, *overrides: str) -> Setup:
        """A copy with some values of the recipe changed, see `Recipe.override`."""
        return replace(self, recipe=self.recipe.override(*overrides))

    def max_samples(self, C: int) -> int:
        """The most samples of a k-means problem with C centroids."""
        return self.recipe.train.max_samples_per_centroid * C
