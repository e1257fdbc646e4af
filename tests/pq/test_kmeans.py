from itertools import pairwise

import pytest
import torch

from million_cli.pq import kmeans as module
from million_cli.pq.codec import nearest_centroid
from million_cli.pq.faiss_kmeans import faiss_kmeans, import_faiss
from million_cli.pq.kmeans import kmeans, seed_centroids
from million_cli.recipe import SEEDINGS

TRAINERS = {"torch": kmeans, "faiss": faiss_kmeans}


def mean_squared_error(samples, centroids):
    """float64 [N]."""
    samples, centroids = samples.double(), centroids.double()
    codes = nearest_centroid(samples, centroids)
    nearest = centroids.gather(1, codes[..., None].expand_as(samples))
    return (samples - nearest).square().sum(2).mean(1)


def gaussian(N, n, dsub):
    return torch.randn(N, n, dsub)


def heavy_tails(N, n, dsub):
    return torch.distributions.StudentT(2.5).sample((N, n, dsub))


def correlated(N, n, dsub):
    return torch.randn(N, n, dsub) @ (torch.eye(dsub) * 0.1 + 1.0)


def far_from_the_origin(N, n, dsub):
    return torch.randn(N, n, dsub) * torch.linspace(0.1, 3, dsub) + 50


def clusters(N, n, dsub):
    centers = torch.randn(N, 40, dsub) * 10
    return centers[:, torch.randint(40, (n,))] + torch.randn(N, n, dsub) * 0.1


def rounded(N, n, dsub):
    return (torch.randn(N, n, dsub) * 4).round()


CONTINUOUS = [gaussian, heavy_tails, correlated, far_from_the_origin]
DISTRIBUTIONS = [*CONTINUOUS, clusters, rounded]


def errors_of_both(distribution, dsub, C, seeding, draw=0):
    """Mean squared errors by torch and by FAISS."""
    torch.manual_seed(draw)
    samples = distribution(4, 2000, dsub)
    return [
        mean_squared_error(samples, train(samples, C, seed=1, seeding=seeding)).mean().item()
        for train in TRAINERS.values()
    ]


@pytest.mark.parametrize("seeding", SEEDINGS)
@pytest.mark.parametrize("distribution", CONTINUOUS)
@pytest.mark.parametrize(("dsub", "C"), [(1, 16), (2, 64), (2, 256), (4, 32), (8, 16)])
def test_torch_and_faiss_find_equally_good_centroids(distribution, dsub, C, seeding):
    torch_error, faiss_error = errors_of_both(distribution, dsub, C, seeding)
    assert torch_error == pytest.approx(faiss_error, rel=0.02)


@pytest.mark.parametrize("seeding", SEEDINGS)
@pytest.mark.parametrize("distribution", [clusters, rounded])
def test_where_centroids_go_empty_torch_is_at_least_as_good_as_faiss(distribution, seeding):
    """With seeds that fall on equal values or into the same cluster, reseeding beats splitting."""
    for dsub, C in ((1, 8), (2, 64), (4, 32)):
        both = torch.tensor([errors_of_both(distribution, dsub, C, seeding, draw) for draw in range(3)])
        torch_error, faiss_error = both.mean(0)
        assert torch_error <= 1.02 * faiss_error


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_plus_plus_is_not_worse_than_what_faiss_does_by_itself(distribution):
    faiss = import_faiss()
    torch.manual_seed(0)
    samples = distribution(4, 3000, 2)
    theirs = []
    for problem in samples:
        clustering = faiss.Kmeans(2, 64, niter=25, seed=1, min_points_per_centroid=1)
        clustering.train(problem.numpy())
        theirs.append(torch.from_numpy(clustering.centroids))
    their_error = mean_squared_error(samples, torch.stack(theirs)).mean()
    assert mean_squared_error(samples, kmeans(samples, 64)).mean() <= 1.02 * their_error


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_same_seed_gives_the_same_bits(trainer):
    torch.manual_seed(0)
    samples = torch.randn(5, 1000, 2)
    first = TRAINERS[trainer](samples, 32, seed=3)
    torch.manual_seed(99)
    assert torch.equal(TRAINERS[trainer](samples, 32, seed=3), first)
    assert not torch.equal(TRAINERS[trainer](samples, 32, seed=4), first)


def test_neighbours_and_chunks_leave_a_problem_alone(monkeypatch):
    torch.manual_seed(0)
    samples = torch.randn(5, 1000, 2)
    together = kmeans(samples, 32)
    finished = []
    monkeypatch.setitem(module._CHUNK_SAMPLES, "cpu", 2000)
    in_chunks = kmeans(samples, 32, progress=finished.append)
    assert finished == [2, 2, 1]
    alone = torch.cat([kmeans(problem[None], 32) for problem in samples])
    for other in (in_chunks, alone):
        torch.testing.assert_close(
            mean_squared_error(samples, other), mean_squared_error(samples, together), rtol=1e-4, atol=0
        )


def test_it_ends_where_every_centroid_is_the_mean_of_its_samples():
    torch.manual_seed(0)
    samples = torch.randn(3, 500, 2) + 5
    centroids = kmeans(samples, 8, iterations=200).double()
    codes = nearest_centroid(samples.double(), centroids)
    for problem in range(3):
        for c in range(8):
            mean = samples[problem][codes[problem] == c].double().mean(0)
            torch.testing.assert_close(centroids[problem, c], mean, atol=1e-5, rtol=0)


def test_on_a_line_it_ends_where_every_centroid_is_the_mean_of_its_samples():
    torch.manual_seed(0)
    samples = torch.cat([torch.randn(2, 500, 1) + 5, torch.zeros(2, 20, 1)], 1)
    centroids = kmeans(samples, 8, iterations=500).double()
    assert (centroids.diff(dim=1) > 0).all()
    codes = nearest_centroid(samples.double(), centroids)
    for problem in range(2):
        for c in range(8):
            mean = samples[problem][codes[problem] == c].double().mean(0)
            torch.testing.assert_close(centroids[problem, c], mean, atol=1e-5, rtol=0)


def test_more_iterations_are_never_worse():
    torch.manual_seed(0)
    samples = heavy_tails(4, 1000, 2)
    errors = [mean_squared_error(samples, kmeans(samples, 32, iterations=i)) for i in (1, 2, 5, 25)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()


def test_plus_plus_draws_in_proportion_to_the_squared_distance():
    """From 0 the next seed is 1 with probability 1/10 and 3 with 9/10, and so on."""
    samples = torch.tensor([[[0.0], [1.0], [3.0]]])
    counts = torch.zeros(3, 3)
    at = {0.0: 0, 1.0: 1, 3.0: 2}
    for seed in range(900):
        first, second = seed_centroids(samples, 2, seed).flatten().tolist()
        counts[at[first], at[second]] += 1
    assert counts.diagonal().sum() == 0
    expected = torch.tensor([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]])
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), expected, atol=0.08, rtol=0)
    torch.testing.assert_close(counts.sum(1) / 900, torch.full((3,), 1 / 3), atol=0.06, rtol=0)


@pytest.mark.parametrize("seeding", SEEDINGS)
def test_seeds_are_samples(seeding):
    samples = torch.arange(300).float().view(1, 100, 3)
    seeds = seed_centroids(samples, 16, 0, seeding)
    assert len({tuple(row) for row in seeds[0].tolist()}) == 16
    assert (seeds[0, :, None] == samples[0]).all(-1).any(-1).all()


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seeding", SEEDINGS)
def test_fewer_samples_than_centroids_all_become_centroids(trainer, seeding):
    torch.manual_seed(0)
    samples = torch.randn(3, 5, 2) + 7
    centroids = TRAINERS[trainer](samples, 16, seeding=seeding)
    assert centroids.shape == (3, 16, 2)
    assert mean_squared_error(samples, centroids).max() < 1e-10


@pytest.mark.parametrize("trainer", TRAINERS)
def test_few_distinct_values_among_many_samples_all_become_centroids(trainer):
    torch.manual_seed(0)
    values = torch.randn(2, 12, 2) * 5
    samples = values[:, torch.randint(12, (2000,)) ** 2 % 12]
    centroids = TRAINERS[trainer](samples, 16)
    assert mean_squared_error(samples, centroids).max() < 1e-10


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seeding", SEEDINGS)
def test_constant_samples_are_reproduced(trainer, seeding):
    samples = torch.full((2, 300, 2), 4.1)
    centroids = TRAINERS[trainer](samples, 8, seeding=seeding)
    torch.testing.assert_close(centroids, torch.full((2, 8, 2), 4.1))


def test_empty_centroids_move_to_where_the_error_is():
    """Uniform seeds nearly all fall on the value that most samples have; the rest must come by reseeding."""
    torch.manual_seed(0)
    rare = torch.randn(3, 10, 2) * 10
    samples = torch.cat([torch.zeros(3, 2000, 2), rare], 1)
    seeds = seed_centroids(samples, 16, 0, "random")
    assert mean_squared_error(samples, seeds).min() > 0.1
    centroids = kmeans(samples, 16, seeding="random")
    assert mean_squared_error(samples, centroids).max() < 1e-8


def test_half_precision_samples_are_clustered_in_float32():
    torch.manual_seed(0)
    samples = torch.randn(2, 1000, 2).half()
    centroids = kmeans(samples, 16)
    assert centroids.dtype == torch.float32
    assert torch.equal(centroids, kmeans(samples.float(), 16))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("dsub", [1, 2])
def test_with_weights_every_centroid_is_the_weighted_mean_of_its_samples(dsub, trainer):
    torch.manual_seed(0)
    samples, weights = torch.randn(2, 500, dsub) + 5, torch.rand(2, 500) * 9 + 0.1
    centroids = TRAINERS[trainer](samples, 8, iterations=300, weights=weights).double()
    codes = nearest_centroid(samples.double(), centroids)
    for problem in range(2):
        for c in range(8):
            mine = codes[problem] == c
            w = weights[problem][mine].double()[:, None]
            mean = (w * samples[problem][mine].double()).sum(0) / w.sum()
            torch.testing.assert_close(centroids[problem, c], mean, atol=1e-4, rtol=0)


def test_seeds_are_drawn_by_weight_times_squared_distance():
    """From 0 the next seed is 1 or 2 with 9 : 4 if 1 weighs nine times as much."""
    samples, weights = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[1.0, 9.0, 1.0]])
    counts = {1.0: 0, 2.0: 0}
    for seed in range(900):
        first, second = seed_centroids(samples, 2, seed, weights=weights).flatten().tolist()
        if first == 0.0:
            counts[second] += 1
    assert counts[1.0] / sum(counts.values()) == pytest.approx(9 / 13, abs=0.08)
