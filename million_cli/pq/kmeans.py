"""Many small k-means problems at once, in torch on a CPU or a GPU.

The N problems are independent; each has n samples of dsub dimensions.  Seeding is k-means++ (Arthur and
Vassilvitskii 2007), followed by Lloyd's iterations.  The rules where the data are poor:

- A centroid that lost all its samples moves to a sample drawn with probability proportional to its squared
  error, as in the seeding, if any sample has an error; otherwise it stays where it is.
- With at most C distinct samples every distinct sample becomes a centroid, and the others repeat some sample.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Progress = Callable[[int], None]
"""Called with the number of problems finished since the last call."""


def kmeans(
    samples: Tensor,
    C: int,
    *,
    iterations: int = 25,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Centroids of N independent problems: samples [N, n, dsub] (n >= 1, finite) -> float32 [N, C, dsub].

    Runs on the device of the samples, in float32, in chunks of problems, so that working memory is bounded.
    On a CPU the same seed and thread count give the same bits.  What a problem draws depends on the seed and
    its index alone.
    """
    raise AssertionError("written next")
