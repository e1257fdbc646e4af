"""A recipe with where and from which seed it is carried out."""

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
        UserError: the trainer or encoder that the recipe asks for is not to be had here.
    """

    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.recipe.train.trainer == "faiss":
            import_faiss()
        find_encoder(self.recipe.train.encoder)

    def override(self, *overrides: str) -> Setup:
        """With some values of the recipe changed, as `Recipe.override`."""
        return replace(self, recipe=self.recipe.override(*overrides))

    def max_samples(self, C: int) -> int:
        """The most samples of a k-means problem with C centroids."""
        return self.recipe.train.max_samples_per_centroid * C
