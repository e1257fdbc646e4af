"""Many small k-means problems at once, in torch on a CPU or a GPU.

The N problems are independent; each has n samples of dsub dimensions.  Seeds are drawn from the samples by
k-means++ (Arthur and Vassilvitskii 2007) or uniformly (as FAISS does by default), then Lloyd's iterations
follow.  Random numbers are drawn once for all problems, so a problem's result depends on its samples and the
seed, not on its neighbours.

With weights, a centroid is the weighted mean of its samples, sum w x / sum w, and seeds are drawn in
proportion to w times the squared distance.  The iterations minimise the sum of w |x - c|^2.

Poor data:

- A centroid that lost all its samples moves to a sample drawn with probability proportional to its squared
  (weighted) error, as in the seeding, if any sample has an error; otherwise it stays where it is.
- With at most C distinct samples k-means++ makes every distinct sample a centroid; the others repeat some.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from million_cli.pq.argmin import block_elements, near_argmin

Progress = Callable[[int], None]
"""Called with the number of problems finished since the last call."""

# Samples of a chunk of problems: their coordinates stay in a CPU's cache, or fill a GPU.
_CHUNK_SAMPLES = {"cpu": 1 << 16, "cuda": 1 << 25}
_MIN_SEEDING_SAMPLES = 4096
_TINY = torch.finfo(torch.float32).tiny


def kmeans(
    samples: Tensor,
    C: int,
    *,
    iterations: int = 25,
    seed: int = 0,
    seeding: str = "kmeans++",
    initial: Tensor | None = None,
    weights: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Centroids of N independent problems: samples [N, n, dsub] (n >= 1, finite) -> float32 [N, C, dsub].

    `initial` [N, C, dsub] are centroids to go on from, instead of seeds; `weights` [N, n] of the
    samples are positive.  Runs on the device of the samples, in float32, in chunks of problems, so that
    working memory is bounded.  On a CPU the same seed and number of threads give the same bits.
    """
    N, n, dsub = samples.shape
    centroids = torch.empty(N, C, dsub, device=samples.device)
    step = max(1, _chunk_samples(samples.device) // n)
    for start in range(0, N, step):
        chunk = samples[start : start + step].float()
        # Distances are expanded into products, which is accurate near the origin.
        mean = chunk.mean(1, keepdim=True)
        x = chunk - mean
        w = None if weights is None else weights[start : start + step].to(x)
        if initial is None:
            first = seed_centroids(x, C, seed, seeding, w)
        else:
            first = initial[start : start + step].to(x) - mean
        lloyd = _lloyd_on_a_line if dsub == 1 else _lloyd
        centroids[start : start + step] = mean + lloyd(x, first, iterations, seed, w)
        if progress:
            progress(len(chunk))
    return centroids


def _chunk_samples(device: torch.device) -> int:
    return _CHUNK_SAMPLES["cpu" if device.type == "cpu" else "cuda"]


def seed_centroids(
    x: Tensor, C: int, seed: int, seeding: str = "kmeans++", weights: Tensor | None = None
) -> Tensor:
    """Seeds of G problems x [G, n, dsub], weights [G, n] -> [G, C, dsub], each one of the samples.

    k-means++ considers a random part of the samples only: 4 C of them, at least 4096.
    Uniform seeds ignore the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    G, n, dsub = x.shape
    order = torch.randperm(n, generator=generator).to(x.device)
    if seeding == "random":
        return x[:, order[torch.arange(C, device=x.device) % n]]
    draws = torch.rand(C, generator=generator).tolist()
    part = order[: max(_MIN_SEEDING_SAMPLES, 4 * C)]
    by_dim = x[:, part].permute(2, 0, 1).contiguous()  # [dsub, G, s]
    s = by_dim.shape[2]
    w = None if weights is None else weights[:, part].contiguous()
    seeds = x.new_empty(dsub, G, C)
    nearest = torch.full_like(by_dim[0], torch.inf)  # squared distance to the nearest seed so far
    squares, difference, cumulative = (torch.empty_like(nearest) for _ in range(3))
    chosen = torch.full((1, G, 1), int(draws[0] * s), device=x.device)
    for k in range(C):
        if k:
            torch.cumsum(nearest if w is None else nearest * w, 1, out=cumulative)
            target = cumulative[:, -1:] * draws[k]
            chosen = torch.searchsorted(cumulative, target, right=True).clamp_(max=s - 1)[None]
        point = by_dim.gather(2, chosen.expand(dsub, G, 1))
        seeds[..., k] = point[..., 0]
        for j in range(dsub):
            torch.sub(by_dim[j], point[j], out=difference)
            if j:
                squares.addcmul_(difference, difference)
            else:
                torch.mul(difference, difference, out=squares)
        torch.minimum(nearest, squares, out=nearest)
    return seeds.permute(1, 2, 0).contiguous()


def assign(samples: Tensor, centroids: Tensor) -> Tensor:
    """Index of a nearest centroid of samples [N, n, dsub] among [N, C, dsub] -> int64 [N, n].

    As exact as k-means needs it (see `near_argmin`), and faster than the codec's definition.
    """
    assigned = torch.empty(samples.shape[:2], dtype=torch.int64, device=samples.device)
    step = max(1, _chunk_samples(samples.device) // samples.shape[1])
    for start in range(0, len(samples), step):
        chunk = samples[start : start + step].float()
        mean = chunk.mean(1, keepdim=True)
        assigned[start : start + step] = _assign(
            _augment(chunk - mean), centroids[start : start + step] - mean
        )
    return assigned


def _augment(x: Tensor) -> Tensor:
    """x [G, n, dsub] with its factors of `_assign`: [G, n, dsub + 2]."""
    return torch.cat([x, x.new_ones(*x.shape[:2], 1), x.square().sum(2, keepdim=True) / 2], 2)


def _lloyd(x: Tensor, centroids: Tensor, iterations: int, seed: int, weights: Tensor | None) -> Tensor:
    """Lloyd's iterations from centroids [G, C, dsub]: x [G, n, dsub] near the origin -> [G, C, dsub].

    weights: [G, n] or None.
    """
    G, C, dsub = centroids.shape
    augmented = _augment(x)
    weighted = augmented if weights is None else augmented * weights[..., None]
    first_row = torch.arange(0, G * C, C, device=x.device)[:, None]
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(iterations):
        assigned = _assign(augmented, centroids)
        sums = x.new_zeros(G * C, dsub + 2).index_add_(
            0, (assigned + first_row).flatten(), weighted.flatten(0, 1)
        )
        totals, counts, _ = sums.view(G, C, dsub + 2).split([dsub, 1, 1], 2)
        means = totals / counts.clamp(min=_TINY)
        updated = torch.where(counts > 0, means, centroids)
        empty = counts[..., 0] == 0
        if bool(empty.any()):
            updated = _reseed(x, updated, assigned, empty, generator, weights)
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids


def _lloyd_on_a_line(
    x: Tensor, centroids: Tensor, iterations: int, seed: int, weights: Tensor | None
) -> Tensor:
    """`_lloyd` in one dimension, where an iteration takes C searches in sorted samples.

    x [G, n, 1], centroids [G, C, 1], weights [G, n] -> [G, C, 1] in rising order.
    """
    ordered, order = x[..., 0].sort(1)
    G, n = ordered.shape
    w = torch.ones_like(ordered) if weights is None else weights.gather(1, order)
    sums, masses = (_running_sums(terms) for terms in (ordered * w, w))
    ends = torch.tensor([0, n], device=x.device).expand(G, 2)
    generator = torch.Generator().manual_seed(seed + 1)
    line = centroids[..., 0].sort(1).values
    for _ in range(iterations):
        borders = (line[:, 1:] + line[:, :-1]) / 2
        bounds = torch.cat([ends[:, :1], torch.searchsorted(ordered, borders), ends[:, 1:]], 1)
        totals, counts = (part.gather(1, bounds).diff(dim=1) for part in (sums, masses))
        means = (totals / counts.clamp(min=_TINY)).float()
        updated = torch.where(counts > 0, means, line)
        empty = counts == 0
        if bool(empty.any()):
            assigned = torch.searchsorted(borders.contiguous(), ordered, right=True)
            updated = _reseed(ordered[..., None], updated[..., None], assigned, empty, generator, w)[..., 0]
        updated = updated.sort(1).values
        if torch.equal(updated, line):
            break
        line = updated
    return line[..., None]


def _running_sums(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n terms: [G, n] -> float64 [G, n + 1]."""
    return torch.cat([x.new_zeros(len(x), 1), x], 1).cumsum(1, dtype=torch.float64)


def _assign(augmented: Tensor, centroids: Tensor) -> Tensor:
    """Index of a nearest centroid: x, 1, |x|^2/2 as [G, n, dsub + 2], and [G, C, dsub] -> int64 [G, n].

    |x - c|^2 / 2 = (x, 1, |x|^2/2) . (-c, |c|^2/2, 1), so a block of distances is one matrix product.
    """
    G, n, _ = augmented.shape
    C = centroids.shape[1]
    half_norms = centroids.square().sum(2, keepdim=True) / 2
    factors = torch.cat([-centroids, half_norms, torch.ones_like(half_norms)], 2).transpose(1, 2).contiguous()
    budget = block_elements(augmented.device)
    rows = max(1, min(n, budget // C))
    problems = max(1, budget // (C * rows))
    buffer = augmented.new_empty(min(G, problems) * rows * C)
    assigned = torch.empty(G, n, dtype=torch.int64, device=augmented.device)
    for g in range(0, G, problems):
        for r in range(0, n, rows):
            block = augmented[g : g + problems, r : r + rows]
            shape = (*block.shape[:2], C)
            distances = buffer[: shape[0] * shape[1] * C].view(shape)
            torch.bmm(block, factors[g : g + problems], out=distances)
            assigned[g : g + problems, r : r + rows] = near_argmin(distances)
    return assigned


def _reseed(
    x: Tensor,
    centroids: Tensor,
    assigned: Tensor,
    empty: Tensor,
    generator: torch.Generator,
    weights: Tensor | None,
) -> Tensor:
    """Move the empty centroids [G, C] to distinct samples, drawn in proportion to their squared errors.

    With weights [G, n], the errors are multiplied by them.
    """
    G, n, dsub = x.shape
    error = (x - centroids.gather(1, assigned[..., None].expand(G, n, dsub))).square().sum(2)
    if weights is not None:
        error = error * weights
    # The largest of error / Exp(1) are a draw without replacement in proportion to the error.
    race = error / torch.empty(n).exponential_(generator=generator).to(x.device)
    draws = race.topk(min(n, int(empty.sum(1).max())), dim=1).indices
    rank = empty.cumsum(1) - 1  # which draw an empty centroid gets
    drawn = draws.gather(1, rank.clamp(0, draws.shape[1] - 1))
    moved = empty & (rank < draws.shape[1]) & (error.gather(1, drawn) > 0)
    return torch.where(moved[..., None], x.gather(1, drawn[..., None].expand(*drawn.shape, dsub)), centroids)
