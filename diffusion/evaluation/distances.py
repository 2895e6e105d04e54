"""Compute distances between sets of images, as pure functions of their features.

Features are (N, D), float64 on the CPU.
"""

import numpy as np
import torch
from torch import Tensor

from ..runtime.distributed import all_reduce_sum

# with fewer images a Fréchet distance says little; Inception has as many features
MIN_IMAGES = 2048


class Moments:
    """Accumulate mean and covariance of features that come in batches, on several ranks."""

    def __init__(self, dim: int):
        self.n = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def reduce(self) -> tuple[Tensor, Tensor]:
        """Return (mean (D,), unbiased covariance (D, D)) of what all ranks have added."""
        for part in (self.n, self.sum, self.outer):
            all_reduce_sum(part)
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean, unbiased covariance) of (N, D) features, N > 1."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Compute |mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    This is arXiv:1706.08500 eq. 6. The root's trace is that of the symmetric matrix
    (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2).
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = mean_a - mean_b
    return float(mean @ mean + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, max_size: int = 1000, seed: int = 0
) -> float:
    """Compute KID: the squared MMD of kernel (x.y / D + 1)^3, unbiased (arXiv:1801.01401, sec. 4).

    It is the mean over random subsets of at most max_size images, sampled as clean-fid does.
    """
    random = np.random.RandomState(seed)
    D = real.shape[1]
    m = min(len(real), len(fake), max_size)
    total = 0.0
    for _ in range(subsets):
        x = fake[random.choice(len(fake), m, replace=False)]
        y = real[random.choice(len(real), m, replace=False)]
        same = (x @ x.T / D + 1) ** 3 + (y @ y.T / D + 1) ** 3
        across = (x @ y.T / D + 1) ** 3
        total += float(
            (same.sum() - same.diagonal().sum()) / (m * (m - 1)) - 2 * across.sum() / m**2
        )
    return total / subsets


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Compute the fraction of each set in the other's manifold (Kynkäänniemi et al. 2019, eq. 1-2).

    A set's manifold: the balls around its points that reach their third nearest neighbour.
    """

    def fraction_in_manifold(points, manifold):
        # a point is its own nearest neighbour
        nearest = [torch.cdist(x, manifold).kthvalue(4, dim=1) for x in manifold.split(1024)]
        radius = torch.cat([found.values for found in nearest])
        hit = [(torch.cdist(x, manifold) <= radius).any(1) for x in points.split(1024)]
        return float(torch.cat(hit).double().mean())

    return fraction_in_manifold(fake, real), fraction_in_manifold(real, fake)


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Compute exp(E KL(p(y|x) || p(y))), arXiv:1606.03498 sec. 4: mean and std over splits."""
    order = np.random.RandomState(0).permutation(len(probabilities))  # files may come by class
    scores = []
    for p in probabilities[order].tensor_split(min(splits, len(probabilities))):
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(kl.sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))
